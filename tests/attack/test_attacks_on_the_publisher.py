"""What somebody who can write the publisher's ``metadata/``, and has none of its keys, gets signed or followed."""

import shutil

import pytest
from tuf.api.metadata import Metadata, TargetFile
from typer.testing import CliRunner

from cli.app import app
from edge_runtime.contract import trust
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import Digest, digest_of
from edge_runtime.truststore import TrustStore
from tests.publisher import FLEET, MODEL, artifact, put
from trainer.authority import Authority
from trainer.keyring import KEYS, new_key
from trainer.publish import PublishError, Repository

EVIL = b"no model that anybody approved"
OFFLINE = [name for role in ("root", "targets") for name in KEYS[role]]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A repository with two roots, an approved model and an automatic family."""
    folder = tmp_path_factory.mktemp("template")
    repository = Repository.create(folder / "repository")
    repository.enable_auto(MODEL)
    repository.add(put(folder, artifact()), role="targets")
    repository.rotate("snapshot")
    return folder


@pytest.fixture
def root(tmp_path, template):
    shutil.copytree(template / "repository", tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def pinned(template):
    return (template / "repository" / "metadata" / "1.root.json").read_bytes()


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Intruder:
    """Writes ``metadata/``, and signs with a key of his own whatever he wants signed."""

    def __init__(self, root, ahead=0):
        self.folder = root / "metadata"
        self.ahead = ahead
        self.key = new_key()

    def read(self, name):
        return Metadata.from_bytes((self.folder / name).read_bytes())

    def sign(self, name, md):
        md.signatures.clear()
        md.sign(self.key)
        (self.folder / name).write_bytes(md.to_bytes())

    def seize(self, md):
        """Names himself for every role of a root, alone."""
        for role in md.signed.roles:
            md.signed.add_key(self.key.public_key, role)
            md.signed.roles[role].threshold = 1
        return md

    def below(self, root_version):
        """Vouches for his model, names himself director, and signs all below the root as if it were of that version."""
        stamp = self.read("timestamp.json")
        version = stamp.signed.snapshot_meta.version
        snapshot = self.read(f"{version}.snapshot.json")
        number = snapshot.signed.meta["targets.json"].version
        targets = self.read(f"{number}.targets.json")
        path = trust.approved_path(MODEL, digest_of(EVIL))
        target = TargetFile.from_data(path, EVIL, ["sha256"])
        target.unrecognized_fields["custom"] = {"model": MODEL, "version": "6.6.6"}
        targets.signed.targets[path] = target
        targets.signed.add_key(self.key.public_key, trust.DIRECTOR)
        stamp.signed.unrecognized_fields[trust.TABLE]["root"] = root_version
        self.sign(f"{number}.targets.json", targets)
        self.sign(f"{version}.snapshot.json", snapshot)
        stamp.signed.version += self.ahead
        self.sign("timestamp.json", stamp)


def first_root(intruder):
    """His own first root, and no other."""
    md = intruder.seize(intruder.read("1.root.json"))
    (intruder.folder / "2.root.json").unlink()
    intruder.sign("1.root.json", md)
    intruder.below(1)


def own_chain(intruder):
    """His own first root, and a chain from it."""
    for name in ("1.root.json", "2.root.json"):
        intruder.sign(name, intruder.seize(intruder.read(name)))
    intruder.below(2)


def next_root(intruder):
    """The genuine roots, and his own after them."""
    md = intruder.seize(intruder.read("2.root.json"))
    md.signed.version = 3
    intruder.sign("3.root.json", md)
    intruder.below(3)


def newest_root(intruder):
    """The genuine first root, and his own in the place of the newest."""
    intruder.sign("2.root.json", intruder.seize(intruder.read("2.root.json")))
    intruder.below(2)


def no_root(intruder):
    """All that the genuine roots name."""
    intruder.below(2)


def older_keys(intruder):
    """All that the genuine roots name, as if the newest were not followed by anything yet."""
    intruder.below(1)


WAYS = [first_root, own_chain, next_root, newest_root, no_root, older_keys]


def rotation(role):
    return lambda repository, model: repository.rotate(role)


OPERATIONS = {
    "revoke": lambda r, model: r.revoke(Digest("0" * 64)),
    "renew": lambda r, model: r.renew(),
    "refresh": lambda r, model: r.refresh(),
    "approve": lambda r, model: r.add(model, role="targets"),
    "automatic": lambda r, model: r.add(model, role="auto"),
    "allow": lambda r, model: r.enable_auto("other"),
    "retire": lambda r, model: r.retire(*(p.digest for p in r.published())),
    "threshold": lambda r, model: r.resize("root", 3),
    **{f"rotate-{role}": rotation(role) for role in KEYS},
}


@pytest.mark.attack("A97")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ahead", [-1, 0, 1])
def test_metadata_signed_anew_with_the_intruders_own_keys(root, pinned, tmp_path, way, ahead):
    """The publisher brings back the offline keys, or has the online ones only: neither signs anything of it."""
    model = put(tmp_path, artifact(seed=1))
    genuine = contents(root)
    way(Intruder(root, ahead))
    there = genuine.items() | contents(root).items()
    for operation, act in OPERATIONS.items():
        with pytest.raises(PublishError):
            act(Repository(root), model)
        assert contents(root).items() <= there, f"{operation} signed something"
    for name in OFFLINE:
        (root / "keys" / f"{name}.json").unlink()
    for operation in ("refresh", "automatic"):
        with pytest.raises(PublishError):
            OPERATIONS[operation](Repository(root), model)
        assert contents(root).items() <= there, f"{operation} signed something"
    with TrustStore(tmp_path / "device", pinned) as store, pytest.raises(ContractError):
        store.refresh_from(contents(root / "metadata").get)


@pytest.mark.attack("A98")
@pytest.mark.parametrize("since", ["nothing", "a refresh", "two refreshes", "a new timestamp key"])
def test_the_publishers_metadata_is_set_back_to_before_a_revocation(root, pinned, tmp_path, since):
    """All of it is genuine. What the publisher signs next must not bring the revoked model back, for nobody."""
    repository = Repository(root)
    [published] = repository.published()
    old = contents(root / "metadata")
    repository.revoke(published.digest)
    for _ in range({"a refresh": 1, "two refreshes": 2}.get(since, 0)):
        repository.refresh()
    if since == "a new timestamp key":
        repository.rotate("timestamp")
    shutil.rmtree(root / "metadata")
    for name, data in old.items():
        (root / "metadata").mkdir(exist_ok=True)
        (root / "metadata" / name).write_bytes(data)
    if since != "nothing":  # the files from between are gone, and cannot be put back
        with pytest.raises(PublishError, match=r"damaged \(.*No such file.*\); restore it from its backup"):
            Repository(root).refresh()
        return
    Repository(root).refresh()
    with TrustStore(tmp_path / "device", pinned) as store:
        store.refresh(Repository(root).bundle(1))
        assert store.is_revoked(published.digest)


@pytest.mark.attack("A99")
@pytest.mark.parametrize("way", [first_root, own_chain])
def test_a_device_is_not_enrolled_with_the_intruders_root(root, tmp_path, way):
    way(Intruder(root))
    Authority.create(tmp_path / "ca", FLEET)
    home = tmp_path / "pump-17"
    words = ["pki", "device", str(tmp_path / "ca"), "pump-17", "--out", str(home), "--repository", str(root)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "belongs to the first root with SHA-256" in done.stderr
    for path in (root / "keys").glob("*.json"):
        path.unlink()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "no key is here that says which first root is genuine" in done.stderr
    assert not home.exists()
    assert Authority(tmp_path / "ca").entries() == ()
