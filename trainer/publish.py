"""The publisher: which models exist, who vouches for them, and which are revoked. A TUF repository on disk.

``keys/`` holds the private keys (`trainer.keyring`), ``metadata/`` the signed metadata, ``targets/`` the models. Every
file is written temp, fsync, rename, and ``timestamp.json`` last: it names the snapshot and the root that count, so a
crash leaves the state before. Two processes may publish at once: a lock file orders them.

A model is a target ``models/{model}/{digest}.onnx``, signed by both targets keys, or ``auto/{model}/{digest}.onnx``,
signed by the builder key alone where `Repository.enable_auto` allowed that for its family. Releases (who runs what) are
not targets: targets metadata only names the ``director`` key that signs them.

Devices get the metadata over MQTT as one bundle. A TUF client that reads ``metadata/`` and ``targets/`` over HTTP needs
``prefix_targets_with_hash=False``: the paths carry the digest already.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

from converters.gate import check_bytes
from edge_runtime.contract import codec, topics, trust
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import Digest, ModelName, digest_of
from edge_runtime.contract.messages import TrustBundle
from trainer import files
from trainer.keyring import KEYS, Keyring, PublishError
from trainer.metadata import MetadataSet

__all__ = ["PublishError", "Published", "Repository"]

ROLES: Final = ("auto", "targets")

Outgoing = tuple[str, bytes, topics.Delivery]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A model in the repository; ``length`` in bytes, ``role`` who vouches for it: ``targets`` or ``auto``."""

    model: ModelName
    version: str
    digest: Digest
    path: str
    length: int
    role: str


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Repository:
    """A repository on disk; raises `PublishError` when there is none at ``root``. ``clock`` gives UTC time."""

    def __init__(self, root: Path | str, *, clock: Callable[[], datetime] = _utc_now) -> None:
        self._root = Path(root)
        self._metadata = self._root / "metadata"
        self._keys = Keyring(self._root / "keys")
        self._clock = clock
        if not (self._metadata / "timestamp.json").exists():
            raise PublishError(f"{self._root}: no repository here; make one with Repository.create")
        with self._changing() as metadata:  # a crash may have left new keys beside the old ones
            for role in KEYS:
                self._keys.settle(role, metadata.keyids(role))

    @classmethod
    def create(cls, root: Path | str, *, clock: Callable[[], datetime] = _utc_now) -> Self:
        """Opens the repository at ``root``, made with new keys if there is none yet."""
        root = Path(root)
        (root / "metadata").mkdir(parents=True, exist_ok=True)
        with files.locked(root / ".lock"):
            if not (root / "metadata" / "timestamp.json").exists():
                keys = Keyring(root / "keys")
                keys.create()
                for name, data in MetadataSet.first(keys, clock()).items():
                    files.write(root / "metadata" / name, data)
        return cls(root, clock=clock)

    # ── reading ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def pinned_root(self) -> Path:
        """What devices are provisioned with: the first root."""
        return self._metadata / "1.root.json"

    @property
    def director_key(self) -> Path:
        """The key file that signs releases."""
        return self._keys.path(trust.DIRECTOR)

    @property
    def root_version(self) -> int:
        """The version of the root that counts."""
        return self._load().root_version

    @property
    def revoked(self) -> frozenset[Digest]:
        """Digests that no device installs any more."""
        return self._load().revoked

    def expiries(self) -> dict[str, datetime]:
        """When each role's metadata expires (UTC). `refresh` renews snapshot and timestamp, `renew` all."""
        return self._load().expiries

    @property
    def auto_models(self) -> tuple[ModelName, ...]:
        """Families whose models the builder key may publish on its own."""
        return tuple(ModelName(name.removeprefix("auto-")) for name in self._load().auto_roles)

    def published(self) -> tuple[Published, ...]:
        """Every model a device would install, in order of path."""
        metadata = self._load()
        paths = [(path, role) for role in metadata.roles for path in metadata.targets(role)]
        found = [_published(metadata, role, path) for path, role in sorted(paths)]
        return tuple(p for p in found if p.digest not in metadata.revoked)

    def bundle(self, root_version: int = 1) -> TrustBundle:
        """All metadata for devices whose trusted root is ``root_version``: every newer root, and the rest."""
        metadata = self._load()
        if not 1 <= root_version <= metadata.root_version:
            raise PublishError(f"root version {root_version} is outside [1, {metadata.root_version}]")
        names = sorted(metadata.file_names(root_version))
        return TrustBundle(
            root_version=root_version,
            files=tuple((name, (self._metadata / name).read_bytes()) for name in names),
        )

    def outgoing(self, names: topics.Topics, digests: Iterable[Digest]) -> Iterator[Outgoing]:
        """What to publish: the chunks of ``digests``, then a trust bundle for every version of the root.

        In this order, whoever learns of a model finds its chunks. Raises `PublishError` when a digest is not
        published or its file is damaged.
        """
        by_digest = {p.digest: p for p in self.published()}
        for digest in digests:
            if digest not in by_digest:
                raise PublishError(f"{self._root}: {digest} is not published, or was revoked")
            path = self._root / "targets" / by_digest[digest].path
            data = path.read_bytes()
            if digest_of(data) != digest:
                raise PublishError(f"{path}: damaged; put the artifact's file back there")
            for index in range(topics.chunk_count(len(data))):
                start = index * topics.CHUNK_BYTES
                yield names.chunk(digest, index), data[start : start + topics.CHUNK_BYTES], topics.BLOB
        for version in range(1, self.root_version + 1):
            yield names.trust(version), codec.encode(self.bundle(version)), topics.TRUST

    def withdrawn(self, names: topics.Topics, published: Published) -> Iterator[Outgoing]:
        """What to publish so that the broker forgets the chunks of a model that no release names any more."""
        for index in range(topics.chunk_count(published.length)):
            yield names.chunk(published.digest, index), b"", topics.BLOB

    # ── changing ───────────────────────────────────────────────────────────────────────────────────────

    def add(self, artifact: Path | str, *, role: str = "auto") -> Published:
        """Publishes an artifact that passes the static gate; adding it again changes nothing.

        ``auto`` needs the builder, snapshot and timestamp keys, and `enable_auto` before; ``targets`` needs both
        targets keys. Raises `PublishError`, or `ArtifactError` from the gate.
        """
        path = Path(artifact)
        if role not in ROLES:
            raise PublishError(f"role {role!r} is not one of {', '.join(ROLES)}")
        try:
            length = path.stat().st_size
        except OSError as e:
            raise PublishError(f"{path}: cannot be read ({e.strerror})") from e
        if length > topics.MAX_BLOB_BYTES:
            raise PublishError(
                f"{path}: {length} bytes; models of up to {topics.MAX_BLOB_BYTES} travel over MQTT"
            )
        data = path.read_bytes()
        manifest = check_bytes(data, str(path)).manifest
        digest = digest_of(data)
        with self._changing() as metadata:
            if digest in metadata.revoked:
                raise PublishError(f"{path}: {digest} was revoked; convert a new version")
            signer = "targets" if role == "targets" else trust.auto_role(manifest.name)
            if signer not in metadata.roles:
                raise PublishError(
                    f"models of {manifest.name!r} may not be published with the builder key alone: allow it once with "
                    "enable_auto, which needs both targets keys, or publish with role='targets'"
                )
            path_of = trust.approved_path if role == "targets" else trust.auto_path
            target = path_of(manifest.name, digest)
            if target not in metadata.targets(signer):
                created = self._clock().strftime("%Y-%m-%dT%H:%M:%SZ")
                custom = {"model": manifest.name, "version": manifest.version, "created": created}
                metadata.add_target(signer, target, data, custom)
                files.write(self._root / "targets" / target, data)
                self._commit(metadata, [signer], purpose=f"publishing {path.name} with role={role!r}")
            return _published(metadata, signer, target)

    def enable_auto(self, model: ModelName) -> None:
        """Lets the builder key alone publish models of this family. Needs both targets keys."""
        with self._changing() as metadata:
            if trust.auto_role(model) not in metadata.auto_roles:
                role = metadata.delegate(model, self._keys.every("builder")[0])
                self._commit(metadata, ["targets", role], purpose=f"allowing automatic models of {model}")

    def disable_auto(self, model: ModelName) -> None:
        """Takes `enable_auto` back: devices stop accepting what the builder vouched for. Needs both targets keys."""
        with self._changing() as metadata:
            if trust.auto_role(model) in metadata.auto_roles:
                metadata.undelegate(model)
                self._commit(metadata, ["targets"], purpose=f"forbidding automatic models of {model}")

    def revoke(self, *digests: Digest) -> None:
        """No device installs these any more, whoever vouched for them. Needs both targets keys.

        Revoking every version before a certain one sets a floor. A device that already runs a revoked model
        leaves it when a release tells it to.
        """
        with self._changing() as metadata:
            metadata.revoke(digests)
            self._commit(metadata, ["targets"], purpose="revoking a model")

    def retire(self, *digests: Digest) -> None:
        """Forgets models that no device needs any more, to keep the metadata small. They may be added again."""
        with self._changing() as metadata:
            if changed := metadata.forget(digests):
                self._commit(metadata, changed, purpose="retiring a model")

    def refresh(self) -> None:
        """Signs snapshot and timestamp for another seven days. Needs their keys only."""
        with self._changing() as metadata:
            self._commit(metadata, [], purpose="refreshing the repository")

    def renew(self) -> None:
        """Signs root, targets and every delegated role for another year. Needs the keys of each."""
        with self._changing() as metadata:
            metadata.next_root(metadata.keyids("root"), self._keys, self._clock())
            self._commit(metadata, metadata.roles, purpose="renewing the repository")

    def rotate(self, role: str) -> None:
        """Replaces the keys of ``role``, one of `KEYS`, with new ones in ``keys/``. Devices follow on their own.

        The root names the keys of root, targets, snapshot and timestamp, so two root keys are needed for those;
        targets metadata names builder and director, so both targets keys are needed for these.
        """
        if role not in KEYS:
            raise PublishError(f"role {role!r} is not one of {', '.join(KEYS)}")
        with self._changing() as metadata:
            purpose = f"replacing the {role} keys"
            owner = "targets" if role in ("builder", trust.DIRECTOR) else "root"
            self._keys.signers(owner, metadata.keyids(owner), purpose=purpose)  # refuse before a key is made
            fresh = self._keys.stage(role)
            changed = metadata.replace_keys(role, fresh, self._keys, self._clock())
            self._commit(metadata, changed, purpose=purpose)
            self._keys.settle(role, [signer.public_key.keyid for signer in fresh])

    @contextmanager
    def _changing(self) -> Iterator[MetadataSet]:
        with files.locked(self._root / ".lock"):
            yield self._load()

    def _load(self) -> MetadataSet:
        return MetadataSet.load(self._metadata)

    def _commit(self, metadata: MetadataSet, changed: Iterable[str], *, purpose: str) -> None:
        """Signs and writes, after making sure that devices that trust the first root only can still be told."""
        fresh = metadata.sign(changed, self._keys, self._clock(), purpose=purpose)
        kept = [name for name in metadata.file_names(1) if name not in fresh]
        bundle = {name: (self._metadata / name).read_bytes() for name in kept} | fresh
        try:
            codec.encode(TrustBundle(root_version=1, files=tuple(bundle.items())))
        except ContractError as e:
            count = sum(len(metadata.targets(role)) for role in metadata.roles)
            raise PublishError(
                f"{self._root}: the metadata of {count} models does not fit into one message ({e}): retire models "
                "that no device needs any more"
            ) from e
        for name, data in fresh.items():
            files.write(self._metadata / name, data)


def _published(metadata: MetadataSet, role: str, path: str) -> Published:
    target = metadata.targets(role)[path]
    return Published(
        model=ModelName(target.custom["model"]),
        version=target.custom["version"],
        digest=Digest(target.hashes["sha256"]),
        path=path,
        length=target.length,
        role="targets" if role == "targets" else "auto",
    )
