"""The publisher's side of The Update Framework: which models exist, who vouches for them, and which are revoked.

``keys/`` holds the private keys (`trainer.keyring`), ``metadata/`` the signed metadata, ``targets/`` the models. Every
file is written temp, fsync, rename, and ``timestamp.json`` last: it names the snapshot and the root that count, so a
crash leaves the state before. Two processes may publish at once: a lock file orders them.

A model is a target ``models/{model}/{digest}.onnx``, signed by both targets keys, or ``auto/{model}/{digest}.onnx``,
signed by the builder key alone where `Repository.enable_auto` allowed that for its family. Releases (who runs what) are
not targets: targets metadata only names the ``director`` key that signs them.

Source: The Update Framework specification 1.0 (https://theupdateframework.github.io/specification/latest/), with
consistent snapshots; metadata travels as one bundle (`edge_runtime.contract.messages.TrustBundle`).
"""

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from converters.artifact import check_static
from edge_runtime.contract import codec, topics, trust
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import Digest, ModelName, digest_of
from edge_runtime.contract.manifest import read_info
from edge_runtime.contract.messages import TrustBundle
from trainer.keyring import KEYS, Keyring, PublishError, threshold

__all__ = ["PublishError", "Published", "Repository"]

ROLES: Final = ("auto", "targets")
ONLINE_LIFE: Final = timedelta(days=7)
OFFLINE_LIFE: Final = timedelta(days=365)

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


@dataclass(slots=True, kw_only=True)
class _State:
    """The metadata that counts; ``targets`` by role name, the top-level role among them."""

    root: Metadata[Root]
    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]
    targets: dict[str, Metadata[Targets]]
    fresh: list[CryptoSigner] = field(default_factory=list)
    """New root keys, which sign the next root beside the old ones."""

    @property
    def top(self) -> Targets:
        return self.targets["targets"].signed

    @property
    def delegations(self) -> dict[str, DelegatedRole]:
        found = self.top.delegations
        return found.roles if found is not None and found.roles is not None else {}

    @property
    def auto_roles(self) -> list[str]:
        return [name for name in self.delegations if name != trust.DIRECTOR]

    @property
    def revoked(self) -> frozenset[Digest]:
        return trust.read_revoked(self.top.unrecognized_fields)

    def keyids(self, role: str) -> list[str]:
        """The keys that metadata names for ``role``, which is one of `KEYS`."""
        if role == "builder":
            return [keyid for name in self.auto_roles for keyid in self.delegations[name].keyids]
        if role == trust.DIRECTOR:
            return self.delegations[role].keyids
        return self.root.signed.roles[role].keyids


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
        with self._changing() as state:
            for role in KEYS:
                self._keys.settle(role, state.keyids(role))

    @classmethod
    def create(cls, root: Path | str, *, clock: Callable[[], datetime] = _utc_now) -> Self:
        """Opens the repository at ``root``, made with new keys if there is none yet."""
        root = Path(root)
        (root / "metadata").mkdir(parents=True, exist_ok=True)
        with _lock(root):
            if not (root / "metadata" / "timestamp.json").exists():
                keys = Keyring(root / "keys")
                keys.create()
                for name, data in _first_metadata(keys, clock()).items():
                    _write(root / "metadata" / name, data)
        return cls(root, clock=clock)

    # ── reading ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def root_version(self) -> int:
        """The version of the root that counts."""
        return self._load().root.signed.version

    @property
    def pinned_root(self) -> Path:
        """What devices are provisioned with: the first root."""
        return self._metadata / "1.root.json"

    @property
    def revoked(self) -> frozenset[Digest]:
        """Digests that no device installs any more."""
        return self._load().revoked

    @property
    def auto_models(self) -> tuple[ModelName, ...]:
        """Families whose models the builder key may publish on its own."""
        return tuple(ModelName(name.removeprefix("auto-")) for name in self._load().auto_roles)

    def published(self) -> tuple[Published, ...]:
        """Every model a device would install, in order of path."""
        state = self._load()
        found = [_published(t) for md in state.targets.values() for t in md.signed.targets.values()]
        return tuple(sorted((p for p in found if p.digest not in state.revoked), key=lambda p: p.path))

    def expiries(self) -> dict[str, datetime]:
        """When each role's metadata expires (UTC). `refresh` renews snapshot and timestamp, `renew` the others."""
        state = self._load()
        online = {"timestamp": state.timestamp.signed.expires, "snapshot": state.snapshot.signed.expires}
        offline = {name: md.signed.expires for name, md in state.targets.items()}
        return {"root": state.root.signed.expires, **offline, **online}

    def bundle(self, root_version: int = 1) -> TrustBundle:
        """All metadata for devices whose trusted root is ``root_version``: every newer root, and the rest."""
        state = self._load()
        newest = state.root.signed.version
        if not 1 <= root_version <= newest:
            raise PublishError(f"root version {root_version} is outside [1, {newest}]")
        files = {name: (self._metadata / name).read_bytes() for name in _file_names(state, root_version)}
        return TrustBundle(root_version=root_version, files=tuple(sorted(files.items())))

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
        length = path.stat().st_size
        if length > topics.MAX_BLOB_BYTES:
            raise PublishError(
                f"{path}: {length} bytes; models of up to {topics.MAX_BLOB_BYTES} travel over MQTT"
            )
        check_static(path)
        data = path.read_bytes()
        manifest = read_info(data).manifest
        digest = digest_of(data)
        approved = role == "targets"
        target_path = (trust.approved_path if approved else trust.auto_path)(manifest.name, digest)
        name = "targets" if approved else trust.auto_role(manifest.name)
        with self._changing() as state:
            if digest in state.revoked:
                raise PublishError(f"{path}: {digest} was revoked; convert a new version")
            if name not in state.targets:
                raise PublishError(
                    f"models of {manifest.name!r} may not be published with the builder key alone: allow it once with "
                    "enable_auto, which needs both targets keys, or publish with role='targets'"
                )
            signed = state.targets[name].signed
            if target_path not in signed.targets:
                target = TargetFile.from_data(target_path, data, ["sha256"])
                created = self._clock().strftime("%Y-%m-%dT%H:%M:%SZ")
                custom = {
                    "model": manifest.name,
                    "version": manifest.version,
                    "role": role,
                    "created": created,
                }
                target.unrecognized_fields["custom"] = custom
                signed.targets[target_path] = target
                files = self._signed(state, [name], purpose=f"publishing {path.name} with role={role!r}")
                _write(self._root / "targets" / target_path, data)
                self._commit(files)
            return _published(signed.targets[target_path])

    def enable_auto(self, model: ModelName) -> None:
        """Lets the builder key alone publish models of this family. Needs both targets keys."""
        with self._changing() as state:
            name = trust.auto_role(model)
            if name in state.delegations:
                return
            [builder] = self._keys.every("builder")
            pattern = trust.auto_pattern(model)
            state.delegations[name] = DelegatedRole(name, [], 1, terminating=True, paths=[pattern])
            state.top.add_key(builder.public_key, name)
            state.targets[name] = Metadata(Targets())
            self._commit(
                self._signed(state, ["targets", name], purpose=f"allowing automatic models of {model}")
            )

    def disable_auto(self, model: ModelName) -> None:
        """Takes `enable_auto` back: devices stop accepting what the builder vouched for. Needs both targets keys."""
        with self._changing() as state:
            name = trust.auto_role(model)
            if name in state.delegations:
                _drop_keys(state.top, name)
                del state.delegations[name]
                self._commit(
                    self._signed(state, ["targets"], purpose=f"forbidding automatic models of {model}")
                )

    def revoke(self, *digests: Digest) -> None:
        """No device installs these any more, whoever vouched for them. Needs both targets keys.

        Revoking every version before a certain one sets a floor. A device that already runs a revoked model
        leaves it when a release tells it to.
        """
        with self._changing() as state:
            revoked = sorted(state.revoked | set(digests))
            state.top.unrecognized_fields.setdefault(trust.TABLE, {})["revoked"] = revoked
            _forget(state.top, digests)
            self._commit(self._signed(state, ["targets"], purpose="revoking a model"))

    def retire(self, *digests: Digest) -> None:
        """Forgets models that no device needs any more, to keep the metadata small. They may be added again."""
        with self._changing() as state:
            holders = [name for name, md in state.targets.items() if _forget(md.signed, digests)]
            if holders:
                self._commit(self._signed(state, holders, purpose="retiring a model"))

    def refresh(self) -> None:
        """Signs snapshot and timestamp for another seven days. Needs their keys only."""
        with self._changing() as state:
            self._commit(self._signed(state, [], purpose="refreshing the repository"))

    def renew(self) -> None:
        """Signs root, targets and every delegated role for another year. Needs the keys of each."""
        with self._changing() as state:
            purpose = "renewing the repository"
            root = self._next_root(state, purpose=purpose)
            self._commit(root | self._signed(state, list(state.targets), purpose=purpose))

    def rotate(self, role: str) -> None:
        """Replaces the keys of ``role``, one of `KEYS`, with new ones in ``keys/``. Devices follow on their own.

        The root names the keys of root, targets, snapshot and timestamp, so two root keys are needed for those;
        targets metadata names builder and director, so both targets keys are needed for these.
        """
        if role not in KEYS:
            raise PublishError(f"role {role!r} is not one of {', '.join(KEYS)}")
        with self._changing() as state:
            purpose = f"replacing the {role} keys"
            owner = "targets" if role in ("builder", trust.DIRECTOR) else "root"
            self._keys.signers(owner, state.keyids(owner), purpose=purpose)  # refuse before a key is made
            fresh = self._keys.stage(role)
            files: dict[str, bytes] = {}
            if owner == "root":
                _replace_root_keys(state, role, fresh)
                files = self._next_root(state, purpose=purpose)
                changed = ["targets"] if role == "targets" else []
            else:
                delegated = [role] if role == trust.DIRECTOR else state.auto_roles
                for name in delegated:
                    _drop_keys(state.top, name)
                    state.top.add_key(fresh[0].public_key, name)
                changed = ["targets", *(delegated if role == "builder" else [])]
            self._commit(files | self._signed(state, changed, purpose=purpose))
            self._keys.settle(role, [signer.public_key.keyid for signer in fresh])

    # ── signing and writing ────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _changing(self) -> Iterator[_State]:
        with _lock(self._root):
            yield self._load()

    def _load(self) -> _State:
        """What ``timestamp.json`` stands for, every signature checked: nothing foreign is ever signed again."""
        try:
            timestamp = Metadata[Timestamp].from_file(str(self._metadata / "timestamp.json"))
            version = trust.read_root_version(timestamp.signed.unrecognized_fields)
            root = Metadata[Root].from_file(str(self._metadata / f"{version}.root.json"))
            version = timestamp.signed.snapshot_meta.version
            snapshot = Metadata[Snapshot].from_file(str(self._metadata / f"{version}.snapshot.json"))
            root.signed.verify_delegate("root", root.signed_bytes, root.signatures)
            root.signed.verify_delegate("timestamp", timestamp.signed_bytes, timestamp.signatures)
            root.signed.verify_delegate("snapshot", snapshot.signed_bytes, snapshot.signatures)
            state = _State(root=root, timestamp=timestamp, snapshot=snapshot, targets={})
            self._load_targets(state, "targets", root.signed)
            for name in state.auto_roles:
                self._load_targets(state, name, state.top)
        except (OSError, RepositoryError, ContractError, KeyError, ValueError) as e:
            raise PublishError(f"{self._metadata}: damaged ({e}); restore the folder from its backup") from e
        return state

    def _load_targets(self, state: _State, name: str, delegator: Root | Targets) -> None:
        version = state.snapshot.signed.meta[f"{name}.json"].version
        md = Metadata[Targets].from_file(str(self._metadata / f"{version}.{name}.json"))
        delegator.verify_delegate(name, md.signed_bytes, md.signatures)
        state.targets[name] = md

    def _next_root(self, state: _State, *, purpose: str) -> dict[str, bytes]:
        """The next root, signed by the old root keys and by new ones."""
        root = state.root.signed
        before = Metadata[Root].from_file(str(self._metadata / f"{root.version}.root.json")).signed
        signers = self._keys.signers("root", before.roles["root"].keyids, purpose=purpose)
        root.version += 1
        root.expires = self._clock() + OFFLINE_LIFE
        return {f"{root.version}.root.json": _signed(state.root, [*signers, *state.fresh])}

    def _signed(self, state: _State, changed: list[str], *, purpose: str) -> dict[str, bytes]:
        """New versions of the ``changed`` targets roles, of the snapshot and of the timestamp, by file name."""
        now = self._clock()
        files: dict[str, bytes] = {}

        def sign(md: Metadata[Any], role: str, life: timedelta) -> bytes:
            md.signed.expires = now + life
            return _signed(md, self._keys.signers(role, state.keyids(role), purpose=purpose))

        snapshot, timestamp = state.snapshot.signed, state.timestamp.signed
        for name in changed:
            md = state.targets[name]
            before = snapshot.meta.get(f"{name}.json")
            md.signed.version = before.version + 1 if before else 1
            snapshot.meta[f"{name}.json"] = MetaFile(md.signed.version)
            role = "targets" if name == "targets" else "builder"
            files[f"{md.signed.version}.{name}.json"] = sign(md, role, OFFLINE_LIFE)
        snapshot.version += 1
        files[f"{snapshot.version}.snapshot.json"] = sign(state.snapshot, "snapshot", ONLINE_LIFE)
        timestamp.version += 1
        timestamp.snapshot_meta.version = snapshot.version
        timestamp.unrecognized_fields[trust.TABLE] = _stamp(now, state.root.signed)
        files["timestamp.json"] = sign(state.timestamp, "timestamp", ONLINE_LIFE)
        self._check_size(state, files)
        return files

    def _check_size(self, state: _State, files: dict[str, bytes]) -> None:
        """Refuses what would not fit into one message to devices that still trust the first root."""
        kept = [name for name in _file_names(state, 1) if name not in files]
        kept = [name for name in kept if (self._metadata / name).exists()]
        bundle = {name: (self._metadata / name).read_bytes() for name in kept} | files
        try:
            codec.encode(TrustBundle(root_version=1, files=tuple(bundle.items())))
        except ContractError as e:
            count = sum(len(md.signed.targets) for md in state.targets.values())
            raise PublishError(
                f"{self._root}: the metadata of {count} models does not fit into one message ({e}): retire models "
                "that no device needs any more"
            ) from e

    def _commit(self, files: dict[str, bytes]) -> None:
        """Writes ``files`` in order; the timestamp is the last of them."""
        for name, data in files.items():
            _write(self._metadata / name, data)


def _file_names(state: _State, root_version: int) -> list[str]:
    roots = [f"{v}.root.json" for v in range(root_version + 1, state.root.signed.version + 1)]
    targets = [f"{md.signed.version}.{name}.json" for name, md in state.targets.items()]
    return [*roots, *targets, f"{state.snapshot.signed.version}.snapshot.json", "timestamp.json"]


def _first_metadata(keys: Keyring, now: datetime) -> dict[str, bytes]:
    """Version 1 of everything, the timestamp last."""
    root = Root(expires=now + OFFLINE_LIFE, consistent_snapshot=True)
    for role in root.roles:
        for signer in keys.every(role):
            root.add_key(signer.public_key, role)
        root.roles[role].threshold = threshold(role)
    director = DelegatedRole(trust.DIRECTOR, [], 1, terminating=True, paths=["release/*"])
    targets = Targets(
        expires=now + OFFLINE_LIFE,
        delegations=Delegations({}, {trust.DIRECTOR: director}),
        unrecognized_fields={trust.TABLE: {"revoked": []}},
    )
    targets.add_key(keys.every(trust.DIRECTOR)[0].public_key, trust.DIRECTOR)
    timestamp = Timestamp(expires=now + ONLINE_LIFE, unrecognized_fields={trust.TABLE: _stamp(now, root)})
    return {
        "1.root.json": _signed(Metadata(root), keys.every("root")),
        "1.targets.json": _signed(Metadata(targets), keys.every("targets")),
        "1.snapshot.json": _signed(Metadata(Snapshot(expires=now + ONLINE_LIFE)), keys.every("snapshot")),
        "timestamp.json": _signed(Metadata(timestamp), keys.every("timestamp")),
    }


def _stamp(now: datetime, root: Root) -> dict[str, int]:
    """Our own table in a timestamp: when it was signed (a floor for devices without a clock), and under which root."""
    return {"signed": int(now.timestamp()), "root": root.version}


def _signed(md: Metadata[Any], signers: Iterable[CryptoSigner]) -> bytes:
    md.signatures.clear()
    for signer in signers:
        md.sign(signer, append=True)
    return md.to_bytes()


def _replace_root_keys(state: _State, role: str, fresh: list[CryptoSigner]) -> None:
    for keyid in list(state.root.signed.roles[role].keyids):
        state.root.signed.revoke_key(keyid, role)
    for signer in fresh:
        state.root.signed.add_key(signer.public_key, role)
    if role == "root":
        state.fresh = fresh


def _drop_keys(targets: Targets, role: str) -> None:
    for keyid in list(targets.get_delegated_role(role).keyids):
        targets.revoke_key(keyid, role)


def _forget(targets: Targets, digests: Iterable[Digest]) -> bool:
    """Removes the targets with these digests; whether there were any."""
    found = [path for path, target in targets.targets.items() if target.hashes["sha256"] in digests]
    for path in found:
        del targets.targets[path]
    return bool(found)


def _published(target: TargetFile) -> Published:
    return Published(
        model=ModelName(target.custom["model"]),
        version=target.custom["version"],
        digest=Digest(target.hashes["sha256"]),
        path=target.path,
        length=target.length,
        role=target.custom["role"],
    )


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    with (root / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.new")
    with work.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    work.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
