"""A device under attack: it serves a verified model, its publisher is honest, and the way between them is the test's.

The update child's `Update` runs in this process, with its real trust store and real slots; only the broker is one in
memory, so that it can lie, and the trial of a model is taken for granted. What the child says goes through the
daemon's `Updates`, so that a test sees what an operator would read in the device's log.
"""

import json
import logging
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile

from edge_runtime.adapters import sandbox
from edge_runtime.adapters.slots import Slots
from edge_runtime.contract import bundle, codec
from edge_runtime.contract.ids import Digest, digest_of
from edge_runtime.contract.messages import TrustBundle
from edge_runtime.contract.release import Release
from edge_runtime.contract.topics import MIN_CHUNK_BYTES, Topics
from edge_runtime.core import events
from edge_runtime.update_job import Job
from edge_runtime.updater import Update
from edge_runtime.updates import Updates
from tests.publisher import COHORT, DEVICE, FLEET, MODEL, artifact, put, release, signed
from tests.support.memory_broker import MemoryBroker
from trainer.publish import Repository

TOPICS = Topics(FLEET)
CHILD_KILOBYTES = 128 << 10
"""What a child may allocate: it needs between 60 and 100 MB, threads' stacks included."""
PROBED = {
    "ok": True,
    "model": MODEL,
    "rss_bytes": 60_000_000,
    "peak_rss_bytes": 61_000_000,
    "predict_p50_ns": 8_000,
    "predict_p99_ns": 20_000,
    "incumbent_p99_ns": 0,
    "incumbent": "none serves",
    "runs": 2000,
    "golden_rows": 64,
    "budgets": {"predict_p99_ns": 0, "rss_bytes": 0},
}


class _Spoken:
    """A child that has said its lines and ended."""

    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        self._lines = [*lines, {"exit": 0, "stderr": ""}]

    def poll(self) -> dict[str, Any] | None:
        return self._lines.pop(0) if self._lines else None


class Attacked:
    """The device, its publisher and the broker between them; ``serving`` is the model that revision 1 assigned."""

    def __init__(
        self, folder: Path, broker: MemoryBroker, log: pytest.LogCaptureFixture | None = None
    ) -> None:
        self.folder = folder
        self.broker = broker
        self.state = folder / "state"
        self.slots = Slots(self.state)
        self.repository = Repository(folder / "repository")
        self.root = self.repository.pinned_root
        self.seconds = 0.0
        self._log = log
        self.serving = digest_of(artifact(seed=0))

    # ── the publisher ──────────────────────────────────────────────────────────────────────────────────

    def add(self, *, seed: int, role: str = "auto", name: str = MODEL) -> Digest:
        """A model in the repository, which the broker does not know yet."""
        path = put(self.folder, artifact(seed=seed, name=name))
        return self.repository.add(path, role=role, chunk_bytes=MIN_CHUNK_BYTES).digest

    def publish(self, *, seed: int, role: str = "auto", name: str = MODEL) -> Digest:
        """A model in the repository and on the broker, with the current metadata."""
        digest = self.add(seed=seed, role=role, name=name)
        self.broker.publish(self.repository, [digest])
        return digest

    @property
    def told(self) -> dict[str, bytes]:
        """The metadata that the broker retains, by name."""
        return dict(bundle.unpack(self.broker.retained[TOPICS.packed_trust(1)]).files)

    def tell(self, files: Mapping[str, bytes]) -> None:
        """What the broker retains instead from now on."""
        self.tell_bytes(codec.encode(TrustBundle(root_version=1, files=tuple(sorted(files.items())))))

    def tell_bytes(self, message: bytes) -> None:
        """What the broker retains instead, be it metadata or not."""
        self.broker.retained[TOPICS.trust(1)] = message
        self.broker.retained[TOPICS.packed_trust(1)] = zlib.compress(message)

    # ── the device ─────────────────────────────────────────────────────────────────────────────────────

    def job(self, message: bytes, **changes: Any) -> dict[str, Any]:
        """What the daemon asks of the child."""
        document = {
            "state_dir": str(self.state),
            "fleet": FLEET,
            "cohort": COHORT,
            "model": MODEL,
            "device": DEVICE,
            "broker": {"host": "127.0.0.1", "port": 1883},
            "release": message.hex(),
            "root": str(self.root),
            "floor": 0,
            "serving": self.serving,
            "have": [self.serving] if self.serving else [],
            "quarantine": {},
            "budgets": {"predict_p99_ns": 0, "rss_bytes": 0},
            "probe_address_space_bytes": 2_000_000_000,
            "deadline_seconds": 30.0,
        }
        return {**document, **changes}

    def update(self, message: Release | bytes, *, child: bool = False, **changes: Any) -> dict[str, Any]:
        """One job from the release to the child's result, which the daemon hears and logs.

        With ``child`` it is a process of its own, which knows nothing of the broker in memory.
        """
        if isinstance(message, Release):
            message = signed(self.repository, message)
        job = self.job(message, **changes)
        if child:
            return self.hear(self._in_child(job))
        result = Update(Job.read(job)).run()
        return self.hear(result)

    def _in_child(self, job: dict[str, Any]) -> dict[str, Any]:
        limit = f"ulimit -d {CHILD_KILOBYTES}; exec"
        command = ["sh", "-c", f'{limit} "$@"', "sh", sys.executable, "-m", "edge_runtime.updater"]
        began = time.monotonic()
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job).encode())
            process.stdin.close()
            *_, last = [json.loads(line) for line in process.stdout]
        assert process.returncode == 0
        self.seconds = time.monotonic() - began
        found = last["result"]
        assert isinstance(found, dict)
        return found

    def hear(self, result: dict[str, Any]) -> dict[str, Any]:
        """The daemon's side of a result."""
        updates = Updates(None, wake=lambda: None, killed=lambda: None)  # type: ignore[arg-type] # it starts no child
        updates._child = _Spoken([{"result": result}])  # type: ignore[assignment]
        [ended] = updates.listen()
        assert isinstance(ended, events.UpdateEnded)
        assert ended.ok == result["ok"]
        return result

    @property
    def installed(self) -> set[str]:
        """Digests of the models on its disk."""
        return {path.stem for path in (self.state / "blobs").iterdir()}

    # ── what must hold ─────────────────────────────────────────────────────────────────────────────────

    def refuses(self, message: Release | bytes, stage: str, words: str, **changes: Any) -> dict[str, Any]:
        """The device says why it does not follow, logs it, and has what it had."""
        assert self._log is not None
        before = self.installed
        self._log.clear()
        with self._log.at_level(logging.WARNING, "skiffd"):
            result = self.update(message, **changes)
        assert (result["ok"], result["stage"]) == (False, stage), result
        assert words in result["reason"]
        [logged] = [r.getMessage() for r in self._log.records if r.name == "skiffd"]
        assert logged == f"update_failed stage={stage} reason={result['reason']}"
        assert self.slots.has(self.serving, verify=True)
        assert self.installed == before
        assert Slots(self.state / "trust").damage == ()
        return result

    def replace_online_keys(self) -> None:
        """The publisher's answer to a theft of the snapshot and timestamp keys."""
        for role in ("snapshot", "timestamp"):
            self.repository.rotate(role)

    def follows(self, *, seed: int, revision: int) -> Digest:
        """When the attack is over, the publisher's next model is installed."""
        digest = self.publish(seed=seed)
        result = self.update(release(digest, revision=revision))
        assert result["ok"], result
        assert self.slots.has(digest, verify=True)
        return digest


def settle(folder: Path, broker: MemoryBroker) -> None:
    """A publisher and a device that follows its first release, in a folder to be copied for each attack."""
    repository = Repository.create(folder / "repository")
    repository.enable_auto(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        broker.stand_before(patch)
        take_trials_for_granted(patch)
        device = Attacked(folder, broker)
        device.publish(seed=0)
        assert device.update(release(device.serving), serving="", have=[])["ok"]


class Thief:
    """Has some of the publisher's keys, and the broker. What he forges is what the broker retains from then on."""

    def __init__(self, device: Attacked, *keys: str) -> None:
        self._device = device
        self._keys = keys

    def signer(self, name: str) -> CryptoSigner:
        """The signer in a stolen key file."""
        document = json.loads((self._device.repository.director_key.parent / f"{name}.json").read_bytes())
        key = load_pem_private_key(document["private_key_pem"].encode(), None)
        return CryptoSigner(key)

    def forge(self, role: str, change: Callable[[Any], object], *, version: int = 0) -> None:
        """Signs the next version of ``role``, or another, after ``change``, and whatever must know of it."""
        files = self._device.told
        number = self._sign(files, role, change, version)
        if role not in ("root", "snapshot", "timestamp"):
            self._sign(files, "snapshot", lambda s: s.meta.update({f"{role}.json": MetaFile(number)}), 0)
        self._device.tell(files)

    def _sign(self, files: dict[str, bytes], role: str, change: Callable[[Any], object], version: int) -> int:
        suffix = f"{role}.json"
        [name] = [n for n in files if n.partition(".")[2] == suffix or n == suffix] or ["1.root.json"]
        md: Metadata[Any] = Metadata.from_bytes(files.get(name, self._device.root.read_bytes()))
        signed_before = set(md.signatures)
        change(md.signed)
        md.signed.version = number = version or md.signed.version + 1
        md.signatures.clear()
        for signer in map(self.signer, self._keys):
            if signer.public_key.keyid in signed_before:
                md.sign(signer, append=True)
        if role == "timestamp":
            files[name] = md.to_bytes()
            return number
        files.pop(name, None)
        files[f"{number}.{suffix}"] = md.to_bytes()
        if role == "snapshot":
            self._sign(files, "timestamp", lambda t: setattr(t, "snapshot_meta", MetaFile(number)), 0)
        return number


def take_trials_for_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model passes its probe."""
    answer = json.dumps(PROBED).encode()
    monkeypatch.setattr(sandbox, "run", lambda *_, **__: sandbox.Ended(0, answer, ""))
