"""Registry, signer, and the hook that makes a better model."""

import json
import os
import shutil
import sys
import threading

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from aggregator.adapters.hooks import KILL_GRACE_SECONDS, OUTPUT_TAIL_BYTES, Hook
from aggregator.adapters.registry import RESCAN_SECONDS, Registry
from aggregator.adapters.signer import Director, Signer
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import CohortId, RolloutId, digest_of
from edge_runtime.contract.release import Release, from_payload
from tests.support.fleet import FLEET, MODEL, A, publish_artifact
from trainer.publish import Repository


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


# ── registry ───────────────────────────────────────────────────────────────────────────────────────────


def test_an_artifact_is_found_anywhere_in_the_tree_also_behind_tufs_prefix(tmp_path):
    tiny, digest = publish_artifact(tmp_path / "deep" / "er")
    found = Registry(tmp_path).info(digest)
    assert found is not None
    assert found.manifest == tiny.manifest
    assert len(found.reference.groups) == 6
    plain = tmp_path / "deep" / "er" / f"{digest}.onnx"
    plain.rename(plain.with_name(f"{'0' * 64}.{digest}.onnx"))
    again = Registry(tmp_path).info(digest)
    assert again is not None
    assert again.reference == found.reference


def test_a_new_artifact_is_found_but_the_tree_is_not_walked_for_every_question(tmp_path):
    clock = Clock()
    registry = Registry(tmp_path, clock=clock)
    assert registry.info(A) is None
    _, digest = publish_artifact(tmp_path)
    assert registry.info(digest) is None
    clock.now += RESCAN_SECONDS
    assert registry.info(digest) is not None


def test_what_was_published_a_moment_ago_is_found_for_an_operator(tmp_path):
    registry = Registry(tmp_path, clock=Clock())
    assert registry.info(A) is None
    _, digest = publish_artifact(tmp_path)
    assert registry.info(digest, now=True) is not None


def test_a_file_that_was_half_copied_is_read_again_when_it_is_whole(tmp_path):
    registry = Registry(tmp_path, clock=Clock())
    _, digest = publish_artifact(tmp_path)
    (path,) = tmp_path.rglob(f"*{digest}.onnx")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    os.utime(path, ns=(1, 1))
    assert registry.info(digest, now=True) is None
    path.write_bytes(whole)
    assert registry.info(digest, now=True) is not None


def test_an_unsound_file_is_named_once_and_ignored(tmp_path, caplog):
    clock = Clock()
    (tmp_path / f"{A}.onnx").write_bytes(b"other bytes")
    junk = digest_of(b"junk")
    (tmp_path / f"{junk}.onnx").write_bytes(b"junk")
    (tmp_path / "name.onnx").write_bytes(b"not asked for")
    registry = Registry(tmp_path, clock=clock)
    for _ in range(3):
        assert registry.info(A) is None
        assert registry.info(junk) is None
        clock.now += RESCAN_SECONDS
    assert len(caplog.records) == 2
    assert "do not have the digest" in caplog.text


# ── signer ─────────────────────────────────────────────────────────────────────────────────────────────

RELEASE = Release(
    fleet=FLEET,
    cohort=CohortId("main"),
    model=MODEL,
    rollout=RolloutId("r1"),
    revision=4,
    threshold=7,
    candidate=A,
    incumbent=None,
)


def write_key(path, key, **changes):
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    path.write_text(json.dumps({"keyid": "abc", "private_key_pem": pem, **changes}), encoding="utf-8")
    return path


def test_a_release_is_signed_over_its_canonical_bytes(tmp_path):
    key = Ed25519PrivateKey.generate()
    signed = Signer(write_key(tmp_path / "director.json", key)).sign(RELEASE)
    ((keyid, signature),) = signed.signatures
    assert keyid == "abc"
    assert from_payload(signed.payload) == RELEASE
    key.public_key().verify(signature, signed.payload)
    with pytest.raises(InvalidSignature):
        key.public_key().verify(signature, signed.payload + b" ")


def test_a_key_that_cannot_sign_is_refused_with_the_file_and_the_field(tmp_path):
    path = tmp_path / "director.json"
    with pytest.raises(ConfigError, match=r"director\.json: cannot be read"):
        Signer(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="not JSON"):
        Signer(path)
    with pytest.raises(ConfigError, match="signs with Ed25519"):
        Signer(write_key(path, ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(ConfigError, match=r"private_key_pem: is no private key"):
        Signer(write_key(path, Ed25519PrivateKey.generate(), private_key_pem="nonsense"))


def test_a_key_that_was_replaced_on_the_disk_signs_without_a_restart(tmp_path, caplog):
    repository = Repository.create(tmp_path / "repository")
    copy, metadata = tmp_path / "director.json", tmp_path / "repository" / "metadata"
    old = repository.director_key.read_text()
    copy.write_text(old)
    director = Director(copy, metadata)

    def trouble():
        return director.trouble

    assert not trouble()
    assert not director.look()

    repository.rotate("director")
    assert not director.look()
    assert f"{copy} holds the key {json.loads(old)['keyid'][:12]}…" in trouble()
    assert "copy the director's key file" in trouble()
    assert caplog.text.count("director_key_refused") == 1
    assert Director(copy, metadata).trouble == trouble()  # the same at the start

    copy.write_text("{")
    assert not director.look()  # it is being written
    assert trouble()
    copy.write_text(repository.director_key.read_text())
    assert director.look()  # whatever is in force has to be signed again
    assert not trouble()
    signed = director.sign(RELEASE)
    assert signed is not None
    (signature,) = signed.signatures
    assert signature[0] == json.loads(copy.read_text())["keyid"]
    assert not director.look()


def test_metadata_that_arrives_in_any_order_is_read_when_it_is_whole(tmp_path):
    repository = Repository.create(tmp_path / "repository")
    published = tmp_path / "repository" / "metadata"
    copy, metadata = tmp_path / "director.json", tmp_path / "copied"
    copy.write_text(repository.director_key.read_text())
    shutil.copytree(published, metadata)
    director = Director(copy, metadata)
    repository.rotate("director")
    late = sorted({p.name for p in published.iterdir()} - {p.name for p in metadata.iterdir()})
    assert late
    shutil.copy(published / "timestamp.json", metadata)
    assert not director.look()
    assert not director.trouble, "what was known still counts"
    for name in late:
        shutil.copy(published / name, metadata)
    director.look()
    assert "holds the key" in director.trouble


def test_a_key_of_which_nobody_can_say_whether_it_counts_signs(tmp_path):
    path = write_key(tmp_path / "director.json", Ed25519PrivateKey.generate())
    assert not Director(path, tmp_path / "metadata").trouble
    keyless = Director(None, tmp_path / "metadata")
    assert keyless.sign(RELEASE) is None
    assert "set director_key" in keyless.trouble


# ── hook ───────────────────────────────────────────────────────────────────────────────────────────────


def hook(tmp_path, script, *, timeout_seconds=60.0, clock=None):
    options = {} if clock is None else {"clock": clock}
    return Hook(
        (sys.executable, "-c", script, "{request}"),
        tmp_path / "retrain",
        timeout_seconds=timeout_seconds,
        **options,
    )


def result_of(made):
    for _ in range(2000):
        found = made.poll()
        if found is not None:
            return found
        threading.Event().wait(0.005)
    raise AssertionError("the hook did not end")


def test_the_hook_gets_the_request_and_its_output_is_kept(tmp_path):
    made = hook(
        tmp_path, "import sys; print(open(sys.argv[1]).read()); print('bad', file=sys.stderr); sys.exit(3)"
    )
    assert made.start(7, '{"model": "tiny"}') is None
    assert made.busy
    with pytest.raises(RuntimeError, match="running already"):
        made.start(8, "{}")
    found = result_of(made)
    assert (found.number, found.exit_code) == (7, 3)
    assert '{"model": "tiny"}' in found.output
    assert "bad" in found.output
    assert not made.busy
    assert made.poll() is None


def test_only_the_tail_of_a_long_output_is_kept(tmp_path):
    made = hook(tmp_path, "print('x' * 100000 + 'end')")
    made.start(1, "{}")
    found = result_of(made)
    assert len(found.output) == OUTPUT_TAIL_BYTES
    assert found.output.endswith("end\n")


def test_a_command_that_is_not_there_is_a_result(tmp_path):
    made = Hook(("/no/such/command", "{request}"), tmp_path, timeout_seconds=1)
    found = made.start(1, "{}")
    assert found is not None
    assert found.exit_code == 127
    assert "cannot start '/no/such/command'" in found.output
    assert not made.busy


def test_a_hook_that_takes_too_long_is_ended(tmp_path):
    clock = Clock()
    made = hook(
        tmp_path, "import time; print('on', flush=True); time.sleep(600)", timeout_seconds=5, clock=clock
    )
    made.start(1, "{}")
    assert made.poll() is None
    clock.now += 5
    found = result_of(made)
    assert found.exit_code < 0
    assert "ended after 5 s" in found.output


def test_a_hook_that_ignores_the_signal_is_killed(tmp_path):
    clock = Clock()
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        " open('ready', 'w').close(); print('deaf', flush=True); time.sleep(600)"
    )
    script = script.replace("'ready'", repr(str(tmp_path / "ready")))
    made = hook(tmp_path, script, timeout_seconds=5, clock=clock)
    made.start(1, "{}")
    while not (tmp_path / "ready").exists():
        threading.Event().wait(0.005)
    clock.now += 5
    assert made.poll() is None
    clock.now += KILL_GRACE_SECONDS
    assert result_of(made).exit_code == -9


def test_stopping_ends_a_running_hook(tmp_path):
    made = hook(tmp_path, "import time; time.sleep(600)")
    assert made.stop() is None
    made.start(1, "{}")
    assert made.stop().exit_code < 0
    assert not made.busy
