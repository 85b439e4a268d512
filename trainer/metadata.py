"""The signed metadata of a repository as one value: read and verified, changed, signed. The trainer's only tuf import.

Read means: from the first root on, as a device does. Whose first root that is, the keys say (`trainer.keyring`).

Source: The Update Framework specification 1.0 (https://theupdateframework.github.io/specification/latest/), with
consistent snapshots. Our own fields in it are described in `edge_runtime.contract.trust`.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from edge_runtime.contract import trust
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import Digest, ModelName, digest_of
from trainer.keyring import KEYS, Need, PublishError, first_threshold

T = TypeVar("T", Root, Timestamp, Snapshot, Targets)

FIRST_ROOT: Final = "1.root.json"
TIMESTAMP: Final = "timestamp.json"
_ROOT: Final = re.compile(r"([1-9][0-9]{0,8})\.root\.json")
ONLINE_LIFE: Final = timedelta(days=7)
"""How long snapshot and timestamp are believed."""
OFFLINE_LIFE: Final = timedelta(days=365)
"""How long root and targets roles are believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A file of metadata that is to be signed by as many as each of ``needs`` says; its contents are final."""

    name: str
    metadata: Metadata[Any]
    needs: tuple[Need, ...]

    def signed(self, signers: Iterable[CryptoSigner]) -> bytes:
        """The file."""
        return _signed(self.metadata, signers)


@dataclass(frozen=True, slots=True)
class Folder:
    """The metadata in ``path``, as it will be when ``pending`` files, by name, have been written there."""

    path: Path
    pending: Mapping[str, bytes] = field(default_factory=dict)

    def read(self, name: str) -> bytes:
        """A file; raises `OSError`."""
        return self.pending[name] if name in self.pending else (self.path / name).read_bytes()

    @property
    def newest_root(self) -> int:
        """The highest version of a root that has a file."""
        names = [*self.pending, *(path.name for path in self.path.glob("*.root.json"))]
        return max((int(found[1]) for name in names if (found := _ROOT.fullmatch(name))), default=1)


class MetadataSet:
    """The metadata that counts: root, timestamp, snapshot, the targets role and the roles it delegates to."""

    def __init__(
        self,
        root: Metadata[Root],
        timestamp: Metadata[Timestamp],
        snapshot: Metadata[Snapshot],
        targets: dict[str, Metadata[Targets]],
        first: bytes,
    ) -> None:
        self._root = root
        self._timestamp = timestamp
        self._snapshot = snapshot
        self._targets = targets
        self._root_before = self.need("root")
        self._root_version_before = root.signed.version
        self.first_file: Final = first
        """The first root, from which all of it descends, as it was read."""
        self.unfinished: tuple[str, ...] | None = None
        """None, or what the newest root wants signed anew beside snapshot and timestamp: targets, or nothing."""

    @classmethod
    def first(cls, keys: Mapping[str, CryptoSigner], now: datetime) -> dict[str, bytes]:
        """Version 1 of every file, the timestamp last, signed with the `KEYS` of a new repository, by their names."""

        def every(role: str) -> list[CryptoSigner]:
            return [keys[name] for name in KEYS[role]]

        root = Root(expires=now + OFFLINE_LIFE, consistent_snapshot=True)
        for role in root.roles:
            for signer in every(role):
                root.add_key(signer.public_key, role)
            root.roles[role].threshold = first_threshold(role)
        director = DelegatedRole(trust.DIRECTOR, [], 1, terminating=True, paths=["release/*"])
        targets = Targets(
            expires=now + OFFLINE_LIFE,
            delegations=Delegations({}, {trust.DIRECTOR: director}),
            unrecognized_fields={trust.TABLE: {"revoked": []}},
        )
        targets.add_key(every(trust.DIRECTOR)[0].public_key, trust.DIRECTOR)
        stamp = {trust.TABLE: _stamp(now, root)}
        timestamp = Timestamp(expires=now + ONLINE_LIFE, unrecognized_fields=stamp)
        return {
            FIRST_ROOT: _signed(Metadata(root), every("root")),
            "1.targets.json": _signed(Metadata(targets), every("targets")),
            "1.snapshot.json": _signed(Metadata(Snapshot(expires=now + ONLINE_LIFE)), every("snapshot")),
            TIMESTAMP: _signed(Metadata(timestamp), every("timestamp")),
        }

    @classmethod
    def load(cls, folder: Folder, staged: Collection[str] = ()) -> Self:
        """What ``folder`` holds, verified from the first root to the newest, and below that; raises `PublishError`.

        Nothing that somebody slipped into the folder is ever signed again, once the caller has compared `first_root`
        with what the keys say. ``staged`` are new keys, by keyid, of a change that may have ended with its root written
        and nothing else: see `unfinished`.
        """
        try:
            return cls._verified(folder, staged)
        except (OSError, RepositoryError, ContractError, KeyError, ValueError) as e:
            raise PublishError(f"{folder.path}: damaged ({e}); restore it from its backup") from e

    @classmethod
    def _verified(cls, folder: Folder, staged: Collection[str]) -> Self:
        first = folder.read(FIRST_ROOT)
        chain = _chain(folder, first)
        timestamp = _parsed(TIMESTAMP, folder.read(TIMESTAMP), Timestamp)
        lag = _lag(chain, timestamp.signed)
        try:
            return cls._below(chain, chain[-1].signed, folder, timestamp, first)
        except UnsignedMetadataError:
            if lag != 1 or not _begun(chain, staged):
                raise
        found = cls._below(chain, chain[-2].signed, folder, timestamp, first)
        old, new = (md.signed.roles["targets"] for md in chain[-2:])
        found.unfinished = ("targets",) if old != new else ()
        return found

    @classmethod
    def _below(
        cls,
        chain: Sequence[Metadata[Root]],
        judge: Root,
        folder: Folder,
        timestamp: Metadata[Timestamp],
        first: bytes,
    ) -> Self:
        """What ``timestamp`` stands for, signed as ``judge`` and targets metadata ask."""
        judge.verify_delegate("timestamp", timestamp.signed_bytes, timestamp.signatures)
        version = timestamp.signed.snapshot_meta.version
        snapshot = _versioned(folder, "snapshot", version, Snapshot)
        judge.verify_delegate("snapshot", snapshot.signed_bytes, snapshot.signatures)
        found = cls(chain[-1], timestamp, snapshot, {}, first)
        found._load_role(folder, "targets", judge)
        for role in found.auto_roles:
            found._load_role(folder, role, found._top)
        return found

    def _load_role(self, folder: Folder, name: str, delegator: Root | Targets) -> None:
        md = _versioned(folder, name, self._snapshot.signed.meta[f"{name}.json"].version, Targets)
        delegator.verify_delegate(name, md.signed_bytes, md.signatures)
        self._targets[name] = md

    # ── reading ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _top(self) -> Targets:
        return self._targets["targets"].signed

    @property
    def _delegations(self) -> dict[str, DelegatedRole]:
        found = self._top.delegations
        if found is None or found.roles is None:
            raise PublishError("targets metadata delegates nothing: this repository was not made by skiff")
        return found.roles

    @property
    def first_root(self) -> Digest:
        """The SHA-256 of `first_file`."""
        return digest_of(self.first_file)

    @property
    def root_version(self) -> int:
        """The version of the root that counts."""
        return self._root.signed.version

    @property
    def auto_roles(self) -> tuple[str, ...]:
        """The delegated roles that the builder key signs."""
        return tuple(name for name in self._delegations if name != trust.DIRECTOR)

    @property
    def roles(self) -> tuple[str, ...]:
        """Every role that vouches for targets: ``targets`` and `auto_roles`."""
        return tuple(self._targets)

    @property
    def revoked(self) -> frozenset[Digest]:
        """Digests that no device installs any more."""
        return trust.read_revoked(self._top.unrecognized_fields)

    @property
    def expiries(self) -> dict[str, datetime]:
        """When each role's metadata expires (UTC)."""
        online = {"timestamp": self._timestamp.signed.expires, "snapshot": self._snapshot.signed.expires}
        offline = {name: md.signed.expires for name, md in self._targets.items()}
        return {"root": self._root.signed.expires, **offline, **online}

    def targets(self, role: str) -> Mapping[str, TargetFile]:
        """The targets of one of `roles`, by path."""
        return self._targets[role].signed.targets

    def keyids(self, role: str) -> list[str]:
        """The keys that metadata names for ``role``, which is one of `trainer.keyring.KEYS`."""
        if role == "builder":
            return [keyid for name in self.auto_roles for keyid in self._delegations[name].keyids]
        return list(self.need(role).keyids)

    def need(self, role: str) -> Need:
        """Who signs for ``role``: root, timestamp, snapshot, director or one of `roles`."""
        found = self._root.signed.roles.get(role) or self._delegations[role]
        kind = "builder" if role in self._targets and role != "targets" else role
        return Need(role=kind, keyids=tuple(found.keyids), threshold=found.threshold)

    def version(self, role: str) -> int:
        """The version of the metadata of root, timestamp, snapshot or one of `roles`."""
        versions = {name: md.signed.version for name, md in self._targets.items()}
        online = {"timestamp": self._timestamp.signed.version, "snapshot": self._snapshot.signed.version}
        return {"root": self.root_version, **versions, **online}[role]

    def file_names(self, root_version: int) -> list[str]:
        """The files that whoever trusts the root of ``root_version`` needs."""
        roots = [f"{v}.root.json" for v in range(root_version + 1, self.root_version + 1)]
        targets = [f"{md.signed.version}.{name}.json" for name, md in self._targets.items()]
        return [*roots, *targets, f"{self._snapshot.signed.version}.snapshot.json", TIMESTAMP]

    # ── changing, before `sign` ────────────────────────────────────────────────────────────────────────

    def add_target(self, role: str, path: str, data: bytes, custom: Mapping[str, Any]) -> None:
        """Lets ``role`` vouch for ``data`` under ``path``."""
        target = TargetFile.from_data(path, data, ["sha256"])
        target.unrecognized_fields["custom"] = dict(custom)
        self._targets[role].signed.targets[path] = target

    def forget(self, digests: Collection[Digest]) -> list[str]:
        """Removes the targets with these digests; returns the roles that had any."""
        changed = []
        for name, md in self._targets.items():
            found = [path for path, target in md.signed.targets.items() if target.hashes["sha256"] in digests]
            for path in found:
                del md.signed.targets[path]
            if found:
                changed.append(name)
        return changed

    def revoke(self, digests: Collection[Digest]) -> None:
        """Adds to `revoked`."""
        table = self._top.unrecognized_fields.setdefault(trust.TABLE, {})
        table["revoked"] = sorted(self.revoked | set(digests))

    def delegate(self, model: ModelName, builder: Key) -> str:
        """Lets ``builder`` vouch for automatic models of a family; returns the role's name."""
        name = trust.auto_role(model)
        pattern = trust.auto_pattern(model)
        self._delegations[name] = DelegatedRole(name, [], 1, terminating=True, paths=[pattern])
        self._top.add_key(builder, name)
        self._targets[name] = Metadata(Targets())
        return name

    def undelegate(self, model: ModelName) -> None:
        """Takes `delegate` back."""
        name = trust.auto_role(model)
        self._name_keys(self._top, name, [])
        del self._delegations[name]
        del self._targets[name]

    def replace_keys(self, role: str, fresh: Iterable[Key], now: datetime) -> list[str]:
        """Names ``fresh`` keys for ``role``; returns the targets roles that have to be signed again for it."""
        if role in self._root.signed.roles:
            return self.resize(role, fresh, self.need(role).threshold, now)
        delegated = [role] if role == trust.DIRECTOR else list(self.auto_roles)
        for name in delegated:
            self._name_keys(self._top, name, list(fresh))
        return ["targets", *(delegated if role == "builder" else [])]

    def resize(self, role: str, keys: Iterable[Key], threshold: int, now: datetime) -> list[str]:
        """Has ``threshold`` of ``keys`` sign for ``role``, which the root names; returns as `replace_keys` does."""
        self._name_keys(self._root.signed, role, keys)
        self._root.signed.roles[role].threshold = threshold
        self.next_root(now)
        return ["targets"] if role == "targets" else []

    def key(self, keyid: str) -> Key:
        """A key that the root names."""
        return self._root.signed.keys[keyid]

    def next_root(self, now: datetime) -> None:
        """Makes a new version of the root, once, to be signed as the version before says and as it says itself."""
        self._root.signed.version += 1
        self._root.signed.expires = now + OFFLINE_LIFE

    @staticmethod
    def _name_keys(delegator: Root | Targets, role: str, keys: Iterable[Key]) -> None:
        for keyid in list(delegator.get_delegated_role(role).keyids):
            delegator.revoke_key(keyid, role)
        for key in keys:
            delegator.add_key(key, role)

    # ── signing ────────────────────────────────────────────────────────────────────────────────────────

    def drafts(self, changed: Iterable[str], now: datetime) -> list[Draft]:
        """What is to be signed and written, in this order: a new root if there is one, new versions of the
        ``changed`` targets roles, of the snapshot and of the timestamp.
        """
        drafts = []
        snapshot, timestamp = self._snapshot.signed, self._timestamp.signed
        if self.root_version != self._root_version_before:
            needs = tuple(dict.fromkeys((self._root_before, self.need("root"))))
            drafts.append(Draft(name=f"{self.root_version}.root.json", metadata=self._root, needs=needs))
        for name in changed:
            md = self._targets[name]
            before = snapshot.meta.get(f"{name}.json")
            md.signed.version = before.version + 1 if before else 1
            md.signed.expires = now + OFFLINE_LIFE
            snapshot.meta[f"{name}.json"] = MetaFile(md.signed.version)
            drafts.append(
                Draft(name=f"{md.signed.version}.{name}.json", metadata=md, needs=(self.need(name),))
            )
        snapshot.version += 1
        timestamp.version += 1
        timestamp.snapshot_meta.version = snapshot.version
        timestamp.unrecognized_fields[trust.TABLE] = _stamp(now, self._root.signed)
        snapshot.expires = timestamp.expires = now + ONLINE_LIFE
        return [
            *drafts,
            Draft(
                name=f"{snapshot.version}.snapshot.json",
                metadata=self._snapshot,
                needs=(self.need("snapshot"),),
            ),
            Draft(name=TIMESTAMP, metadata=self._timestamp, needs=(self.need("timestamp"),)),
        ]


def _parsed(name: str, data: bytes, kind: type[T]) -> Metadata[T]:
    """A file of one kind, not verified; raises `ValueError` or `RepositoryError`."""
    md = Metadata[T].from_bytes(data)
    if not isinstance(md.signed, kind):
        raise ValueError(f"{name} is no {kind.type} metadata")  # noqa: TRY004 (a value of the wrong kind in a file)
    return md


def _versioned(folder: Folder, role: str, version: int, kind: type[T]) -> Metadata[T]:
    name = f"{version}.{role}.json"
    md = _parsed(name, folder.read(name), kind)
    if md.signed.version != version:
        raise ValueError(f"{name} holds version {md.signed.version}")
    return md


def _chain(folder: Folder, first: bytes) -> list[Metadata[Root]]:
    """Every root from the first on, each signed as the one before asks and as it asks itself (TUF 1.0, section 5.3)."""
    chain = [_parsed(FIRST_ROOT, first, Root)]
    chain += [_versioned(folder, "root", version, Root) for version in range(2, folder.newest_root + 1)]
    for version, md in enumerate(chain, 1):
        for judge in chain[max(version - 2, 0) : version]:
            try:
                judge.signed.verify_delegate("root", md.signed_bytes, md.signatures)
            except RepositoryError as e:
                raise ValueError(
                    f"{version}.root.json is not signed as {judge.signed.version}.root.json asks: {e}"
                ) from e
    return chain


def _lag(chain: Sequence[Metadata[Root]], timestamp: Timestamp) -> int:
    """How many roots there are after the one that the timestamp was signed under."""
    named = trust.read_root_version(timestamp.unrecognized_fields)
    if named > len(chain):
        raise ValueError(f"{named}.root.json, which {TIMESTAMP} names, is missing")
    return len(chain) - named


def _begun(chain: Sequence[Metadata[Root]], staged: Collection[str]) -> bool:
    """Whether the newest root names new keys, and all of these are ``staged``: the change is this publisher's own."""
    new = set(chain[-1].signed.keys) - set(chain[-2].signed.keys)
    return bool(new) and new <= set(staged)


def _stamp(now: datetime, root: Root) -> dict[str, int]:
    return {"signed": int(now.timestamp()), "root": root.version}


def _signed(md: Metadata[Any], signers: Iterable[CryptoSigner]) -> bytes:
    md.signatures.clear()
    for signer in signers:
        md.sign(signer, append=True)
    return md.to_bytes()
