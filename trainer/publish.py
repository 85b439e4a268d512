"""The publisher: which models exist, who vouches for them, and which are revoked. A TUF repository on disk.

``keys/`` holds the private keys (`trainer.keyring`), ``metadata/`` the signed metadata, ``targets/`` the models. Every
file is written temp, fsync, rename, and ``timestamp.json`` last: it names the snapshot and the root that count. What a
crash interrupts is finished by whoever opens it next (`trainer.store`). Two processes may publish at once: a lock file
orders them.

A model is a target ``models/{model}/{digest}.onnx``, signed by both targets keys, or ``auto/{model}/{digest}.onnx``,
signed by the builder key alone where `Repository.enable_auto` allowed that for its family. Releases (who runs what) are
not targets: targets metadata only names the ``director`` key that signs them.

Devices get the metadata over MQTT as one bundle, or file by file from a web server that offers ``metadata/`` and
``targets/`` of this folder as they are. Any other TUF client that reads them there needs
``prefix_targets_with_hash=False``: the paths carry the digest already.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

from securesystemslib.signer import CryptoSigner

from converters.gate import MAX_ARTIFACT_BYTES, check_bytes
from edge_runtime.contract import topics, trust
from edge_runtime.contract.ids import Digest, ModelName, digest_of
from edge_runtime.contract.manifest import manifest_digest
from edge_runtime.contract.messages import TrustBundle
from trainer import files, outgoing
from trainer.change import Change, RoleState
from trainer.keyring import KEYS, MAX_KEYS, SHARED, PublishError, names_of, new_key
from trainer.metadata import MetadataSet
from trainer.outgoing import Collected, Outgoing, Published
from trainer.store import Plan, Store

__all__ = ["PublishError", "Published", "Repository"]

ROLES: Final = ("auto", "targets")


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
        self._clock = clock
        self._store = Store(self._root, clock, look=look)
        self._keys = self._store.keys
        self._load()

    @classmethod
    def create(cls, root: Path | str, *, clock: Callable[[], datetime] = _utc_now) -> Self:
        """Opens the repository at ``root``, made with new keys if there is nothing yet.

        Raises `PublishError` where only a part of one is: devices would not follow another in its place.
        """
        Store.create(Path(root), clock)
        return cls(root, clock=clock)

    @classmethod
    def anchor(cls, root: Path | str, first_root: Digest) -> tuple[str, ...]:
        """Has the keys in ``root`` say that they belong to ``first_root``; returns the files that did not.

        For keys from before they did: compare the digest with what a device has as its root. Raises `PublishError`.
        """
        return Store(Path(root), _utc_now).anchor(first_root)

    # ── reading ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def pinned_root(self) -> Path:
        """What devices are provisioned with: the first root."""
        return self._metadata / "1.root.json"

    def first_root(self) -> bytes:
        """The first root, for a new device; raises `PublishError` unless a key here says that it is genuine."""
        return self._store.first_root()

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
        return outgoing.published(self._load())

    def wanted(self, digests: Iterable[Digest]) -> tuple[Published, ...]:
        """These models; raises `PublishError` when one is not published."""
        return self._wanted(self._load(), digests)

    def bundle(self, root_version: int = 1) -> TrustBundle:
        """All metadata for devices whose trusted root is ``root_version``: every newer root, and the rest."""
        return self._collect().bundle(root_version)

    def chunks(self, names: topics.Topics, models: Iterable[Published]) -> Iterator[Outgoing]:
        """The chunks of ``models``; raises `PublishError` when a file is damaged."""
        for model in models:
            yield from outgoing.chunks(self._root / "targets", names, model)

    def outgoing(
        self, names: topics.Topics, digests: Iterable[Digest], *, sent: Iterable[Published] = ()
    ) -> Iterator[Outgoing]:
        """What to publish: the chunks of ``digests``, then the metadata for every version of the root, in both forms.

        In this order, whoever learns of a model finds its chunks; those of ``sent`` are there already, unless another
        size was signed since. All is of one moment. Raises `PublishError` when a digest is not published or its file
        is damaged.
        """
        collected = self._collect()
        there = {(model.digest, model.chunk_bytes) for model in sent}
        for model in self._wanted(collected.metadata, digests):
            if (model.digest, model.chunk_bytes) not in there:
                yield from self.chunks(names, [model])
        yield from collected.messages(names)

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Waits until no other publisher sends metadata, and holds off the next.

        What is collected and sent inside is never overtaken by older metadata: whoever comes later collects later. A
        lock of its own, so that a slow broker keeps nobody from signing.
        """
        with files.locked(self._root / ".sending"):
            yield

    def withdrawn(self, names: topics.Topics, published: Published) -> Iterator[Outgoing]:
        """What to publish so that the broker forgets the chunks of a model that no release names any more."""
        return outgoing.withdrawn(names, published)

    def _wanted(self, metadata: MetadataSet, digests: Iterable[Digest]) -> tuple[Published, ...]:
        known = {model.digest: model for model in outgoing.published(metadata)}
        wanted = tuple(digests)
        for digest in wanted:
            if digest not in known:
                raise PublishError(f"{self._root}: {digest} is not published, or was revoked")
        return tuple(known[digest] for digest in wanted)

    def _collect(self) -> Collected:
        with self._changing() as metadata:
            return Collected.read(self._metadata, metadata.file_names(1))

    # ── changing ───────────────────────────────────────────────────────────────────────────────────────

    def add(self, artifact: Path | str, *, role: str = "auto", chunk_bytes: int | None = None) -> Published:
        """Publishes an artifact that passes the static gate; adding it again changes nothing but its chunks' size.

        Signed with it are its manifest's digest, its budgets, and the size of its chunks on a broker: None for what was
        signed before, or else `topics.CHUNK_BYTES`; publish a changed one to the broker again. ``auto`` needs
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
        if chunk_bytes is not None and not topics.MIN_CHUNK_BYTES <= chunk_bytes <= topics.MAX_CHUNK_BYTES:
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
                    f"models of {manifest.name!r} may not be published with the builder key alone: allow it once, "
                    f"with both targets keys: skiff pki init {self._root} --auto {manifest.name}; or publish with the "
                    "role 'targets'"
                )
            path_of = trust.approved_path if role == "targets" else trust.auto_path
            target = path_of(manifest.name, digest)
            size = self._chunk_size(metadata, target, digest, chunk_bytes)
            if (
                target not in metadata.targets(signer)
                or Published.read(metadata, signer, target).chunk_bytes != size
            ):
                created = self._clock().strftime("%Y-%m-%dT%H:%M:%SZ")
                custom = {
                    "model": manifest.name,
                    "version": manifest.version,
                    "created": created,
                    **trust.describe(manifest_digest(data), manifest.budgets, size),
                }
                metadata.add_target(signer, target, data, custom)
                files.write(self._root / "targets" / target, data)
                purpose = f"publishing {path.name} with role={role!r}"
                self._commit(metadata, [signer], purpose=purpose, grows=True)
            return Published.read(metadata, signer, target)

    @staticmethod
    def _chunk_size(metadata: MetadataSet, target: str, digest: Digest, asked: int | None) -> int:
        """The size of the chunks of ``target``: what was asked for, or else what devices go by already."""
        known = [model for model in outgoing.published(metadata) if model.digest == digest]
        size = asked or (known[-1].chunk_bytes if known else topics.CHUNK_BYTES)
        if known and known[-1].path > target and known[-1].chunk_bytes != size:
            raise PublishError(
                f"{digest}: the targets keys signed it with chunks of {known[-1].chunk_bytes} bytes, and devices go by "
                "that: publish it with the role targets to change it"
            )
        return size

    def enable_auto(self, model: ModelName) -> None:
        """Lets the builder key alone publish models of this family. Needs both targets keys."""
        with self._changing() as metadata:
            if trust.auto_role(model) not in metadata.auto_roles:
                role = metadata.delegate(model, self._keys.every("builder")[0].public_key)
                purpose = f"allowing automatic models of {model}"
                self._commit(metadata, ["targets", role], purpose=purpose, grows=True)

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

    def retire(self, *digests: Digest, dry_run: bool = False) -> Change:
        """Forgets models that no device needs any more, to keep the metadata small. They may be added again.

        Needs both targets keys for those that they signed, the builder key for others. Nobody installs them from here
        on; their files stay, and a device that runs one goes on. What was revoked stays revoked.
        """
        purpose = "retiring a model"
        with self._changing() as metadata:
            changed = metadata.forget(digests)
            if not changed:
                return Change(purpose=purpose)
            return self._commit(metadata, changed, purpose=purpose, dry_run=dry_run)

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
        with self._store.opened() as metadata:
            yield metadata

    def _load(self) -> MetadataSet:
        with self._store.opened() as metadata:
            return metadata

    def _commit(
        self,
        metadata: MetadataSet,
        changed: Iterable[str],
        *,
        purpose: str,
        fresh: tuple[str, Mapping[str, CryptoSigner]] = ("", {}),
        removed: tuple[str, ...] = (),
        grows: bool = False,
        dry_run: bool = False,
    ) -> Change:
        """Signs and writes ``changed`` targets roles and what goes with them; ``fresh`` are a role and its new keys."""
        plan = Plan(purpose=purpose, role=fresh[0], fresh=fresh[1], removed=removed, grows=grows)
        drafts = metadata.drafts(changed, self._clock())
        return self._store.commit(metadata, drafts, plan, dry_run=dry_run)
