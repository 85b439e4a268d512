"""The folder of a repository: crashes at every write, seen over both ways to fetch; whose root it is; what is none."""

import contextlib
import itertools
import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.app import app
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import digest_of
from edge_runtime.truststore import TrustStore
from tests.publisher import MODEL, artifact, put
from trainer import files
from trainer.keyring import KEYS
from trainer.publish import PublishError, Repository
from trainer.store import LAST_CHANGE

pytestmark = pytest.mark.sampled(3)

RUN = CliRunner()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A repository with an automatic family, and an artifact."""
    folder = tmp_path_factory.mktemp("template")
    Repository.create(folder / "repository").enable_auto(MODEL)
    return folder / "repository", put(folder, artifact())


@pytest.fixture
def root(tmp_path, template):
    shutil.copytree(template[0], tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def model(template):
    return template[1]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def by_mqtt(root, pinned):
    """A device that was provisioned with the first root gets a bundle; it remembers from visit to visit."""
    with TrustStore(root.parent / "mqtt", pinned) as store:
        store.refresh(Repository(root).bundle(store.known_version))


def by_https(root, pinned):
    """The same, with ``metadata/`` as a web server offers it, file by file and as it is just then."""

    def file(name):
        path = root / "metadata" / name
        return path.read_bytes() if path.exists() else None

    with TrustStore(root.parent / "https", pinned) as store:
        store.refresh_from(file)


def every_key_is_here(root):
    """Nothing was lost: whatever the metadata names, its private key is here, and no new key waits."""
    assert all(file for role in Repository(root).roles() for _, file in role.keys)
    assert not list((root / "keys").glob("*.next.json"))


# ── crashes ────────────────────────────────────────────────────────────────────────────────────────────


class Crash(Exception):
    pass


def crash_at(monkeypatch, folder, count):
    """Lets ``count`` changes of the disk succeed and breaks the next one, a write halfway, as a power cut does."""
    left = itertools.count()
    write, replace, unlink = files.write, Path.replace, Path.unlink

    def cut_write(path, data, *, mode=0o644):
        if next(left) == count:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.new").write_bytes(data[: len(data) // 2])
            raise Crash
        write(path, data, mode=mode)

    def cut(real):
        def act(path, *arguments, **options):
            if path.parent == folder / "keys" and not path.name.startswith(".") and next(left) == count:
                raise Crash
            return real(path, *arguments, **options)

        return act

    monkeypatch.setattr(files, "write", cut_write)
    monkeypatch.setattr(Path, "replace", cut(replace))
    monkeypatch.setattr(Path, "unlink", cut(unlink))


def crashes(root, act, count):
    """Whether ``act`` crashed at change ``count`` of the disk, counted from 0."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        crash_at(monkeypatch, root, count)
        try:
            act()
        except Crash:
            return True
    return False


def rotation(role):
    return lambda repository, model: repository.rotate(role)


CHANGES = {
    "add": lambda r, model: r.add(model, role="targets"),
    "auto": lambda r, model: r.add(model, role="auto"),
    "revoke": lambda r, model: r.revoke(digest_of(model.read_bytes())),
    "renew": lambda r, model: r.renew(),
    "more-root-keys": lambda r, model: r.resize("root", 3, 5),
    "fewer-root-keys": lambda r, model: r.resize("root", 1, 2),
    "more-targets-keys": lambda r, model: r.resize("targets", 3, 3),
    **{f"rotate-{role}": rotation(role) for role in KEYS},
}
ROOTS = ["more-root-keys", "more-targets-keys", *(f"rotate-{role}" for role in list(KEYS)[:4])]
"""Changes of the root that make keys."""


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_crash_at_any_write_devices_follow_over_both_ways_and_no_key_is_lost(
    tmp_path, template, model, change
):
    root = tmp_path / "repository"
    pinned = (template[0] / "metadata" / "1.root.json").read_bytes()
    for count in itertools.count():
        for folder in ("repository", "mqtt", "https"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
        shutil.copytree(template[0], root)
        by_mqtt(root, pinned)
        by_https(root, pinned)
        crashed = crashes(root, lambda: CHANGES[change](Repository(root), model), count)
        with contextlib.suppress(ContractError):  # it may see half of a change, and remembers the root
            by_https(root, pinned)
        for again in (lambda r, _: r, CHANGES[change], CHANGES["renew"]):
            again(Repository(root), model)
            every_key_is_here(root)
            by_https(root, pinned)
            by_mqtt(root, pinned)
        if not crashed:
            break
    assert count >= 4


def test_a_crash_while_it_is_made_leaves_nothing_or_what_is_then_finished(tmp_path):
    roots = set()
    for count in itertools.count():
        root = tmp_path / str(count) / "repository"
        crashed = crashes(root, lambda root=root: Repository.create(root), count)
        made = (root / "keys").exists() and contents(root / "keys")
        assert Repository(root, look=True).roles() if made else not (root / "metadata").exists()
        found = Repository.create(root)
        every_key_is_here(root)
        by_https(root, found.pinned_root.read_bytes())
        if made:
            assert made == contents(root / "keys")
        roots.add(found.pinned_root.read_bytes())
        if not crashed:
            break
    assert count > len(roots) / 2 > 5


@pytest.mark.parametrize("change", ROOTS)
def test_what_a_crash_interrupted_is_finished_without_the_offline_keys(root, model, change, caplog):
    """The next command may be the weekly refresh, long after root and targets keys were taken away again."""
    pinned = (root / "metadata" / "1.root.json").read_bytes()
    assert interrupted(root, model, change)
    (root.parent / "safe").mkdir()
    for name in (name for role in ("root", "targets") for name in KEYS[role]):
        shutil.move(root / "keys" / f"{name}.json", root.parent / "safe")
    before = contents(root)
    assert Repository(root, look=True).root_version == 2
    assert contents(root) == before
    Repository(root).refresh()
    assert "writing what is missing of the last change" in caplog.text
    assert not list((root / "keys").glob("*.next.json"))
    by_https(root, pinned)
    by_mqtt(root, pinned)


def interrupted(root, model, change):
    """Breaks ``change`` off right after its root was written."""
    for count in itertools.count():
        copy = root.with_name("copy")
        shutil.copytree(root, copy)
        crashed = crashes(copy, lambda copy=copy: CHANGES[change](Repository(copy), model), count)
        if (copy / "metadata" / "2.root.json").exists():
            shutil.rmtree(root)
            copy.rename(root)
            return crashed
        shutil.rmtree(copy)
    return False


@pytest.mark.parametrize("change", ROOTS)
def test_what_an_earlier_skiff_left_is_finished_by_the_keys_that_wait(root, model, change):
    """It wrote no note; the root is there, and so are the new keys that it names."""
    pinned = (root / "metadata" / "1.root.json").read_bytes()
    assert interrupted(root, model, change)
    (root / "keys" / LAST_CHANGE).unlink()
    second = (root / "metadata" / "2.root.json").read_bytes()
    with contextlib.suppress(ContractError):
        by_https(root, pinned)
    Repository(root)
    assert (root / "metadata" / "2.root.json").read_bytes() == second
    every_key_is_here(root)
    by_https(root, pinned)
    by_mqtt(root, pinned)


def test_finishing_says_which_keys_it_lacks_and_nothing_else_is_done_before(root, model):
    assert interrupted(root, model, "rotate-timestamp")
    (root / "keys" / LAST_CHANGE).unlink()
    shutil.move(root / "keys" / "snapshot.json", root.parent)
    before = contents(root)
    for act in (lambda r: r.refresh(), lambda r: r.rotate("director"), lambda r: r.published()):
        with pytest.raises(
            PublishError, match=r"2\.root\.json began needs 1 of the 1 snapshot keys.*snapshot\.json"
        ):
            act(Repository(root))
        assert contents(root) == before
    shutil.move(root.parent / "snapshot.json", root / "keys")
    Repository(root).refresh()
    every_key_is_here(root)


def test_a_root_whose_keys_are_lost_is_not_built_upon(root, model):
    """As an earlier skiff left it that removed the new keys, or as old files put back make it look."""
    assert interrupted(root, model, "rotate-timestamp")
    (root / "keys" / LAST_CHANGE).unlink()
    (root / "keys" / "timestamp.next.json").unlink()
    before = contents(root)
    with pytest.raises(PublishError, match=r"timestamp was signed by 0/1 keys.*restore it"):
        Repository(root)
    assert contents(root) == before


def test_a_root_that_is_there_is_never_written_over_with_another(root, model):
    assert interrupted(root, model, "rotate-timestamp")
    path = root / "metadata" / "2.root.json"
    genuine, other = path.read_bytes(), b"{}"
    path.write_bytes(other)
    waiting = (root / "keys" / "timestamp.next.json").read_bytes()
    with pytest.raises(PublishError, match="not the root that was signed here"):
        Repository(root)
    assert path.read_bytes() == other
    assert (root / "keys" / "timestamp.next.json").read_bytes() == waiting
    path.unlink()
    Repository(root)
    assert path.read_bytes() == genuine
    every_key_is_here(root)


def test_a_full_disk_changes_nothing_or_is_made_good_once_there_is_room(root, monkeypatch):
    pinned = (root / "metadata" / "1.root.json").read_bytes()
    real = files.write

    def full(path, data, *, mode=0o644):
        if path.name == "timestamp.json":
            raise OSError(28, "No space left on device")
        real(path, data, mode=mode)

    repository = Repository(root)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        with pytest.raises(OSError, match="No space left"):
            repository.rotate("timestamp")
        with pytest.raises(OSError, match="No space left"):
            repository.refresh()
    with contextlib.suppress(ContractError):
        by_https(root, pinned)
    repository.refresh()  # the same process, later
    every_key_is_here(root)
    by_https(root, pinned)


# ── whose root ─────────────────────────────────────────────────────────────────────────────────────────


def forget(root, *names):
    """Key files as an earlier skiff wrote them."""
    for name in names or [name for names in KEYS.values() for name in names]:
        path = root / "keys" / f"{name}.json"
        document = json.loads(path.read_bytes())
        del document["first_root"]
        path.write_text(json.dumps(document))


def test_every_key_file_names_the_first_root_also_those_made_later(root, model):
    digest = digest_of((root / "metadata" / "1.root.json").read_bytes())
    for change in CHANGES.values():
        change(Repository(root), model) if change is not CHANGES["auto"] else None
    named = {p.name: json.loads(p.read_bytes())["first_root"] for p in (root / "keys").glob("*.json")}
    assert set(named.values()) == {digest}
    assert len(named) >= 8


@pytest.mark.parametrize("name", [name for names in KEYS.values() for name in names])
def test_a_key_that_names_no_root_signs_nothing_and_says_what_to_do(root, name):
    forget(root, name)
    before = contents(root)
    with pytest.raises(PublishError, match=rf"{name}\.json: does not say .* skiff pki anchor {root} SHA256"):
        Repository(root).refresh()
    assert contents(root) == before


def test_keys_of_an_earlier_skiff_work_again_once_they_were_anchored(root, model):
    forget(root)
    (root / "keys" / LAST_CHANGE).unlink()
    digest = digest_of((root / "metadata" / "1.root.json").read_bytes())
    before = contents(root)
    done = RUN.invoke(app, ["pki", "anchor", str(root), "0" * 64])
    assert done.exit_code == 1
    assert f"has SHA-256 {digest}, not {'0' * 64}" in done.stderr
    assert contents(root) == before
    done = RUN.invoke(app, ["pki", "anchor", str(root), digest])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("wrote ") == len([name for names in KEYS.values() for name in names])
    assert "says so already" in RUN.invoke(app, ["pki", "anchor", str(root), digest]).stderr
    Repository(root).renew()
    by_https(root, (root / "metadata" / "1.root.json").read_bytes())


def test_a_key_of_another_repository_is_not_anchored_here(root, tmp_path):
    other = Repository.create(tmp_path / "other").pinned_root.read_bytes()
    shutil.copy(tmp_path / "other" / "keys" / "root-1.json", root / "keys")
    forget(root, "root-2")
    before = contents(root)
    digest = digest_of((root / "metadata" / "1.root.json").read_bytes())
    for act in (lambda: Repository(root), lambda: Repository.anchor(root, digest)):
        with pytest.raises(PublishError, match=r"root-1\.json: belongs to (the|another) first root"):
            act()
    assert digest_of(other) != digest
    assert contents(root) == before


# ── what is no repository ──────────────────────────────────────────────────────────────────────────────


def test_without_its_timestamp_the_last_change_is_put_back(root, model):
    digest = Repository(root).add(model, role="targets").digest
    before = contents(root / "metadata")
    (root / "metadata" / "timestamp.json").unlink()
    assert [p.digest for p in Repository.create(root).published()] == [digest]
    assert contents(root / "metadata") == before


REMAINS = {
    "no timestamp": ["metadata/timestamp.json", f"keys/{LAST_CHANGE}"],
    "no metadata": ["metadata", f"keys/{LAST_CHANGE}"],
    "neither keys nor timestamp": ["keys", "metadata/timestamp.json"],
    "models only": ["keys", "metadata"],
    "no keys": ["keys"],
}


@pytest.mark.parametrize("lost", REMAINS)
def test_the_rest_of_a_repository_is_not_made_anew(root, model, lost):
    """Devices would not follow the new one; a restored backup may lack a part."""
    Repository(root).add(model, role="targets")
    for name in REMAINS[lost]:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(root)
    with pytest.raises(PublishError, match=r"timestamp\.json is missing: restore|bring the keys back"):
        Repository.create(root)
    done = RUN.invoke(app, ["pki", "init", str(root)])
    assert done.exit_code == 1
    assert contents(root) | {".lock": b""} == before | {".lock": b""}


@pytest.mark.parametrize("arguments", [[], ["model.onnx"], ["--again"]])
def test_publishing_to_a_mistyped_folder_makes_nothing_and_sends_nothing(
    tmp_path, model, arguments, monkeypatch
):
    monkeypatch.setattr("cli.operate.send", None)
    shutil.copy(model, tmp_path / "model.onnx")
    (tmp_path / "aggregator.toml").write_text(
        'fleet = "demo"\nstate_dir = "s"\nregistry = "r"\ndirector_key = "k"\n'
    )
    typo = tmp_path / "repositry"
    words = [str(tmp_path / word) if word.endswith("onnx") else word for word in arguments]
    done = RUN.invoke(
        app, ["publish", *words, "--repository", str(typo), "--aggregator", str(tmp_path / "aggregator.toml")]
    )
    assert done.exit_code == 1
    assert f"no repository here; make one with: skiff pki init {typo}" in done.stderr.replace("\n", " ")
    assert not typo.exists()


@pytest.mark.parametrize(
    "words", [["rotate", "root"], ["threshold", "root", "3"], ["renew"], ["refresh"], ["revoke", "a" * 64]]
)
def test_a_dry_run_writes_nothing_not_even_a_lock(root, words):
    (root / ".lock").unlink(missing_ok=True)
    before = contents(root)
    done = RUN.invoke(app, ["pki", words[0], str(root), *words[1:], "--dry-run"])
    assert done.exit_code == 0, done.output
    assert contents(root) == before


def test_whoever_holds_a_repository_may_read_it_meanwhile(root):
    """The clock is asked while the lock is held; it must not wait for itself."""
    now = datetime.now(UTC)

    def clock():
        assert repository.published() == ()
        return now

    repository = Repository(root, clock=clock)
    repository.refresh()
    assert repository.expiries()["timestamp"] == now.replace(microsecond=0) + timedelta(days=7)


def test_what_is_opened_to_look_changes_nothing(root):
    before = contents(root)
    with pytest.raises(PublishError, match="opened to look only"):
        Repository(root, look=True).refresh()
    assert contents(root) == before
