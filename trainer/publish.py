"""The publisher: which models exist, who vouches for them, and which are revoked. A TUF repository on disk.

``keys/`` holds the private keys (`trainer.keyring`), ``metadata/`` the signed metadata, ``targets/`` the models. Every
file is written temp, fsync, rename, and ``timestamp.json`` last: it names the snapshot and the root that count, so a
crash leaves the state before. Two processes may publish at once: a lock file orders them.

A model is a target ``models/{model}/{digest}.onnx``, signed by both targets keys, or ``auto/{model}/{digest}.onnx``,
signed by the builder key alone where `Repository.enable_auto` allowed that for its family. Releases (who runs what) are
not targets: targets metadata only names the ``director`` key that signs them.

Devices get the metadata over MQTT as one bundle, or file by file from a web server that offers ``metadata/`` and
``targets/`` of this folder as they are. Any other TUF client that reads them there needs
``prefix_targets_with_hash=False``: the paths carry the digest already.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

from securesystemslib.signer import CryptoSigner

from converters.gate import MAX_ARTIFACT_BYTES, check_bytes
from edge_runtime.contract import bundle, codec, topics, trust
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import Digest, ModelName, digest_of
from edge_runtime.contract.manifest import manifest_digest
from edge_runtime.contract.messages import TrustBundle
from trainer import files
from trainer.change import Change, RoleState, Written
from trainer.keyring import KEYS, MAX_KEYS, SHARED, Keyring, PublishError, names_of, new_key
from trainer.metadata import MetadataSet

__all__ = ["PublishError", "Published", "Repository"]

ROLES: Final = ("auto", "targets")

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


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Repository:
    """A repository on disk; raises `PublishError` when there is none at ``root``. ``clock`` gives UTC time.

    ``look`` only: opening it changes nothing, not even what a crash left.
    """

    def __init__(
        self, root: Path | str, *, clock: Callable[[], datetime] = _utc_now, look: bool = False
    ) -> None:
        self._root = Path(root)
        self._metadata = self._root / "metadata"
        self._keys = Keyring(self._root / "keys")
        self._clock = clock
        if not (self._metadata / "timestamp.json").exists():
            raise PublishError(f"{self._root}: no repository here; make one with Repository.create")
        if look:
            return
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

    def roles(self) -> tuple[RoleState, ...]:
        """Every role with its keys, and which of the private ones are here."""
        metadata = self._load()
        expiries = metadata.expiries
        found = []
        for name in (*expiries, trust.DIRECTOR):
            need = metadata.need(name)
            here = self._keys.here(need.role)
            found.append(
                RoleState(
                    name=name,
                    version=metadata.version(name) if name in expiries else None,
                    expires=expiries.get(name),
                    threshold=need.threshold,
                    keys=tuple((keyid, here.get(keyid, "")) for keyid in need.keyids),
                )
            )
        return tuple(found)

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
        """What to publish: the chunks of ``digests``, then the metadata for every version of the root, in both forms.

        In this order, whoever learns of a model finds its chunks. One that is too large for a broker has none. Raises
        `PublishError` when a digest is not published or its file is damaged.
        """
        by_digest = {p.digest: p for p in self.published()}
        for digest in digests:
            if digest not in by_digest:
                raise PublishError(f"{self._root}: {digest} is not published, or was revoked")
            published = by_digest[digest]
            path = self._root / "targets" / published.path
            data = path.read_bytes()
            if digest_of(data) != digest:
                raise PublishError(f"{path}: damaged; put the artifact's file back there")
            size = published.chunk_bytes
            for index in range(published.chunks):
                start = index * size
                yield names.chunk(digest, index), data[start : start + size], topics.BLOB
        for version in range(1, self.root_version + 1):
            found = self.bundle(version)
            yield names.packed_trust(version), bundle.pack(found), topics.TRUST
            yield names.trust(version), codec.encode(found), topics.TRUST

    def withdrawn(self, names: topics.Topics, published: Published) -> Iterator[Outgoing]:
        """What to publish so that the broker forgets the chunks of a model that no release names any more."""
        for index in range(published.chunks):
            yield names.chunk(published.digest, index), b"", topics.BLOB

    # ── changing ───────────────────────────────────────────────────────────────────────────────────────

    def add(
        self, artifact: Path | str, *, role: str = "auto", chunk_bytes: int = topics.CHUNK_BYTES
    ) -> Published:
        """Publishes an artifact that passes the static gate; adding it again changes nothing.

        Signed with it are its manifest's digest, its budgets, and the size of its chunks on a broker. ``auto`` needs
        the builder, snapshot and timestamp keys, and `enable_auto` before; ``targets`` needs both targets keys. Raises
        `PublishError`, or `ArtifactError` from the gate.
        """
        path = Path(artifact)
        if role not in ROLES:
            raise PublishError(f"role {role!r} is not one of {', '.join(ROLES)}")
        try:
            length = path.stat().st_size
        except OSError as e:
            raise PublishError(f"{path}: cannot be read ({e.strerror})") from e
        if length > MAX_ARTIFACT_BYTES:
            raise PublishError(f"{path}: {length} bytes; models have {MAX_ARTIFACT_BYTES} at most")
        if not topics.MIN_CHUNK_BYTES <= chunk_bytes <= topics.MAX_CHUNK_BYTES:
            raise PublishError(
                f"chunks of {chunk_bytes} bytes are outside [{topics.MIN_CHUNK_BYTES}, {topics.MAX_CHUNK_BYTES}]"
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
                custom = {
                    "model": manifest.name,
                    "version": manifest.version,
                    "created": created,
                    **trust.describe(manifest_digest(data), manifest.budgets, chunk_bytes),
                }
                metadata.add_target(signer, target, data, custom)
                files.write(self._root / "targets" / target, data)
                self._commit(metadata, [signer], purpose=f"publishing {path.name} with role={role!r}")
            return _published(metadata, signer, target)

    def enable_auto(self, model: ModelName) -> None:
        """Lets the builder key alone publish models of this family. Needs both targets keys."""
        with self._changing() as metadata:
            if trust.auto_role(model) not in metadata.auto_roles:
                role = metadata.delegate(model, self._keys.every("builder")[0].public_key)
                self._commit(metadata, ["targets", role], purpose=f"allowing automatic models of {model}")

    def disable_auto(self, model: ModelName) -> None:
        """Takes `enable_auto` back: devices stop accepting what the builder vouched for. Needs both targets keys."""
        with self._changing() as metadata:
            if trust.auto_role(model) in metadata.auto_roles:
                metadata.undelegate(model)
                self._commit(metadata, ["targets"], purpose=f"forbidding automatic models of {model}")

    def revoke(self, *digests: Digest, dry_run: bool = False) -> Change:
        """No device installs these any more, whoever vouched for them. Needs both targets keys.

        Revoking every version before a certain one sets a floor. A device that already runs a revoked model
        leaves it when a release tells it to.
        """
        with self._changing() as metadata:
            metadata.revoke(digests)
            return self._commit(metadata, ["targets"], purpose="revoking a model", dry_run=dry_run)

    def retire(self, *digests: Digest) -> None:
        """Forgets models that no device needs any more, to keep the metadata small. They may be added again."""
        with self._changing() as metadata:
            if changed := metadata.forget(digests):
                self._commit(metadata, changed, purpose="retiring a model")

    def refresh(self, *, dry_run: bool = False) -> Change:
        """Signs snapshot and timestamp for another seven days. Needs their keys only."""
        with self._changing() as metadata:
            return self._commit(metadata, [], purpose="refreshing the repository", dry_run=dry_run)

    def renew(self, *, dry_run: bool = False) -> Change:
        """Signs root, targets and every delegated role for another year. Needs the keys of each."""
        with self._changing() as metadata:
            metadata.next_root(self._clock())
            return self._commit(metadata, metadata.roles, purpose="renewing the repository", dry_run=dry_run)

    def rotate(self, role: str, *, dry_run: bool = False) -> Change:
        """Replaces the keys of ``role``, one of `KEYS`, with new ones in ``keys/``. Devices follow on their own.

        The root names the keys of root, targets, snapshot and timestamp, so root keys must sign for those;
        targets metadata names builder and director, so targets keys must sign for these.
        """
        if role not in KEYS:
            raise PublishError(f"role {role!r} is not one of {', '.join(KEYS)}")
        with self._changing() as metadata:
            count = len(metadata.keyids(role)) if role in SHARED else 1
            fresh = {name: new_key() for name in names_of(role, count)}
            changed = metadata.replace_keys(role, [key.public_key for key in fresh.values()], self._clock())
            return self._commit(
                metadata, changed, purpose=f"replacing the {role} keys", fresh=(role, fresh), dry_run=dry_run
            )

    def resize(self, role: str, threshold: int, keys: int = 0, *, dry_run: bool = False) -> Change:
        """Has ``threshold`` of ``keys`` keys (0: as many as there are) sign for root or targets from now on.

        Further keys are made; when there are to be fewer, those with the highest numbers go. A new root is signed by as
        many old keys as the old one asks for and as many of the new as it asks for itself, so devices follow.
        """
        if role not in SHARED:
            raise PublishError(
                f"role {role!r} has one key: only {' and '.join(SHARED)} are signed by several"
            )
        with self._changing() as metadata:
            before = metadata.need(role)
            count = keys or len(before.keyids)
            if not 1 <= threshold <= count <= MAX_KEYS:
                raise PublishError(
                    f"{threshold} of {count} {role} keys: the threshold is at least 1 and at most the number of keys, "
                    f"which is at most {MAX_KEYS}"
                )
            purpose = f"having {threshold} of {count} {role} keys sign"
            if (threshold, count) == (before.threshold, len(before.keyids)):
                return Change(purpose=purpose)
            kept = self._kept(role, before.keyids, count)
            fresh = {name: new_key() for name in names_of(role, count)[len(kept) :]}
            public = [metadata.key(keyid) for keyid in kept] + [key.public_key for key in fresh.values()]
            return self._commit(
                metadata,
                metadata.resize(role, public, threshold, self._clock()),
                purpose=purpose,
                fresh=(role, fresh),
                removed=names_of(role, len(before.keyids))[count:],
                dry_run=dry_run,
            )

    def _kept(self, role: str, keyids: tuple[str, ...], count: int) -> tuple[str, ...]:
        """The first ``count`` of the keys that there are; their files say which those are, if not all stay."""
        if count >= len(keyids):
            return keyids
        by_file = {path: keyid for keyid, path in self._keys.here(role).items() if keyid in keyids}
        files_kept = [self._keys.path(name).name for name in names_of(role, count)]
        if missing := [name for name in files_kept if name not in by_file]:
            raise PublishError(
                f"with {count} of the {len(keyids)} {role} keys left, those that stay have to be here: bring back "
                f"{' and '.join(missing)}"
            )
        return tuple(by_file[name] for name in files_kept)

    @contextmanager
    def _changing(self) -> Iterator[MetadataSet]:
        with files.locked(self._root / ".lock"):
            yield self._load()

    def _load(self) -> MetadataSet:
        return MetadataSet.load(self._metadata)

    def _commit(
        self,
        metadata: MetadataSet,
        changed: Iterable[str],
        *,
        purpose: str,
        fresh: tuple[str, Mapping[str, CryptoSigner]] = ("", {}),
        removed: tuple[str, ...] = (),
        dry_run: bool = False,
    ) -> Change:
        """Signs and writes, after making sure that devices that trust the first root only can still be told.

        ``fresh`` are a role and new keys for it; ``dry_run`` only says what would be done.
        """
        drafts = metadata.drafts(changed, self._clock())
        role, keys = fresh
        change = Change(
            purpose=purpose,
            metadata=tuple(
                Written(
                    name=draft.name,
                    version=draft.metadata.signed.version,
                    expires=draft.metadata.signed.expires,
                    signers=tuple(self._keys.at_hand(need, keys) for need in draft.needs),
                )
                for draft in drafts
            ),
            new_keys=tuple(self._keys.path(name).name for name in keys),
            removed_keys=tuple(self._keys.path(name).name for name in removed),
        )
        if dry_run:
            return change
        signed = {}
        for draft in drafts:
            groups = [self._keys.signers(need, purpose=purpose, fresh=keys) for need in draft.needs]
            signed[draft.name] = draft.signed(
                {s.public_key.keyid: s for group in groups for s in group}.values()
            )
        self._check_size(metadata, signed)
        self._keys.stage(keys)
        for name, data in signed.items():
            files.write(self._metadata / name, data)
        if keys:
            self._keys.settle(role, [signer.public_key.keyid for signer in keys.values()])
        self._keys.drop(removed)
        return change

    def _check_size(self, metadata: MetadataSet, fresh: Mapping[str, bytes]) -> None:
        """Raises `PublishError` when a device that trusts the first root only could not be told ``fresh`` any more."""
        kept = [name for name in metadata.file_names(1) if name not in fresh]
        bundle = {name: (self._metadata / name).read_bytes() for name in kept} | dict(fresh)
        try:
            codec.encode(TrustBundle(root_version=1, files=tuple(bundle.items())))
        except ContractError as e:
            count = sum(len(metadata.targets(role)) for role in metadata.roles)
            raise PublishError(
                f"{self._root}: the metadata of {count} models does not fit into one message ({e}): retire models "
                "that no device needs any more"
            ) from e


def _published(metadata: MetadataSet, role: str, path: str) -> Published:
    target = metadata.targets(role)[path]
    digest = Digest(target.hashes["sha256"])
    return Published(
        model=ModelName(target.custom["model"]),
        version=target.custom["version"],
        digest=digest,
        path=path,
        length=target.length,
        role="targets" if role == "targets" else "auto",
        chunk_bytes=trust.read_target(digest, path, target.length, target.custom).chunk_bytes,
    )
