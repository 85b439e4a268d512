"""What a repository gives to brokers: its models in chunks, and its metadata for every version of the root."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.contract import bundle, codec, topics, trust
from edge_runtime.contract.ids import Digest, ModelName, digest_of
from edge_runtime.contract.messages import TrustBundle
from trainer.keyring import PublishError
from trainer.metadata import Folder, MetadataSet

Outgoing = tuple[str, bytes, topics.Delivery]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A model in the repository; ``length`` in bytes, ``role`` who vouches for it: ``targets`` or ``auto``.

    A broker gets it in chunks of ``chunk_bytes``, unless it is too large for one.
    """

    model: ModelName
    version: str
    digest: Digest
    path: str
    length: int
    role: str
    chunk_bytes: int

    @property
    def on_brokers(self) -> bool:
        """Whether it travels over MQTT; if not, devices need the address of a web server."""
        return self.length <= topics.MAX_BLOB_BYTES

    @property
    def chunks(self) -> int:
        """How many messages it is on a broker."""
        return topics.chunk_count(self.length, self.chunk_bytes) if self.on_brokers else 0

    @classmethod
    def read(cls, metadata: MetadataSet, role: str, path: str) -> "Published":
        """The target at ``path`` of ``role``."""
        target = metadata.targets(role)[path]
        digest = Digest(target.hashes["sha256"])
        return cls(
            model=ModelName(target.custom["model"]),
            version=target.custom["version"],
            digest=digest,
            path=path,
            length=target.length,
            role="targets" if role == "targets" else "auto",
            chunk_bytes=trust.read_target(digest, path, target.length, target.custom).chunk_bytes,
        )


def published(metadata: MetadataSet) -> tuple[Published, ...]:
    """Every model a device would install, in order of path: where two roles vouch for one, ``targets`` comes last."""
    paths = [(path, role) for role in metadata.roles for path in metadata.targets(role)]
    found = [Published.read(metadata, role, path) for path, role in sorted(paths)]
    return tuple(p for p in found if p.digest not in metadata.revoked)


@dataclass(frozen=True, slots=True)
class Collected:
    """The metadata at one moment, and its files by name: the bytes that it was read from."""

    metadata: MetadataSet
    files: Mapping[str, bytes]

    @classmethod
    def read(cls, folder: Path, names: Collection[str]) -> "Collected":
        """Reads every file once and verifies what was read; raises `PublishError` when it does not belong together."""
        try:
            files = {name: (folder / name).read_bytes() for name in names}
        except OSError as e:
            raise PublishError(f"{folder}: damaged ({e}); restore it from its backup") from e
        metadata = MetadataSet.load(Folder(folder, files))
        if missing := sorted(set(metadata.file_names(1)) - set(files)):
            raise PublishError(f"{folder}: changed while it was read ({', '.join(missing)}); publish again")
        return cls(metadata, files)

    def bundle(self, root_version: int) -> TrustBundle:
        """All metadata for devices whose trusted root is ``root_version``; raises `PublishError`."""
        if not 1 <= root_version <= self.metadata.root_version:
            raise PublishError(f"root version {root_version} is outside [1, {self.metadata.root_version}]")
        names = sorted(self.metadata.file_names(root_version))
        return TrustBundle(root_version=root_version, files=tuple((name, self.files[name]) for name in names))

    def messages(self, names: topics.Topics) -> Iterator[Outgoing]:
        """The metadata for every version of the root, in both forms."""
        for version in range(1, self.metadata.root_version + 1):
            found = self.bundle(version)
            yield names.packed_trust(version), bundle.pack(found), topics.TRUST
            yield names.trust(version), codec.encode(found), topics.TRUST


def chunks(targets: Path, names: topics.Topics, model: Published) -> Iterator[Outgoing]:
    """A model's chunks, of which it has none when it is too large; raises `PublishError` when its file is damaged."""
    if not model.on_brokers:
        return
    path = targets / model.path
    try:
        data = path.read_bytes()
    except OSError as e:
        raise PublishError(
            f"{path}: cannot be read ({e.strerror}); put the artifact's file back there"
        ) from e
    if digest_of(data) != model.digest:
        raise PublishError(f"{path}: damaged; put the artifact's file back there")
    size = model.chunk_bytes
    for index in range(model.chunks):
        yield names.chunk(model.digest, index), data[index * size : (index + 1) * size], topics.BLOB


def withdrawn(names: topics.Topics, model: Published) -> Iterator[Outgoing]:
    """What to publish so that a broker forgets the chunks of a model that no release names any more."""
    for index in range(model.chunks):
        yield names.chunk(model.digest, index), b"", topics.BLOB
