"""The signed metadata of a repository as one value: read and verified, changed, signed. The trainer's only tuf import.

Source: The Update Framework specification 1.0 (https://theupdateframework.github.io/specification/latest/), with
consistent snapshots. Our own fields in it are described in `edge_runtime.contract.trust`.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
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
from edge_runtime.contract.ids import Digest, ModelName
from trainer.keyring import Keyring, Need, PublishError, first_threshold

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


class MetadataSet:
    """The metadata that counts: root, timestamp, snapshot, the targets role and the roles it delegates to."""

    def __init__(
        self,
        root: Metadata[Root],
        timestamp: Metadata[Timestamp],
        snapshot: Metadata[Snapshot],
        targets: dict[str, Metadata[Targets]],
    ) -> None:
        self._root = root
        self._timestamp = timestamp
        self._snapshot = snapshot
        self._targets = targets
        self._root_before = self.need("root")
        self._root_version_before = root.signed.version

    @classmethod
    def first(cls, keys: Keyring, now: datetime) -> dict[str, bytes]:
        """Version 1 of every file, the timestamp last."""
        root = Root(expires=now + OFFLINE_LIFE, consistent_snapshot=True)
        for role in root.roles:
            for signer in keys.every(role):
                root.add_key(signer.public_key, role)
            root.roles[role].threshold = first_threshold(role)
        director = DelegatedRole(trust.DIRECTOR, [], 1, terminating=True, paths=["release/*"])
        targets = Targets(
            expires=now + OFFLINE_LIFE,
            delegations=Delegations({}, {trust.DIRECTOR: director}),
            unrecognized_fields={trust.TABLE: {"revoked": []}},
        )
        targets.add_key(keys.every(trust.DIRECTOR)[0].public_key, trust.DIRECTOR)
        stamp = {trust.TABLE: _stamp(now, root)}
        timestamp = Timestamp(expires=now + ONLINE_LIFE, unrecognized_fields=stamp)
        return {
            "1.root.json": _signed(Metadata(root), keys.every("root")),
            "1.targets.json": _signed(Metadata(targets), keys.every("targets")),
            "1.snapshot.json": _signed(Metadata(Snapshot(expires=now + ONLINE_LIFE)), keys.every("snapshot")),
            "timestamp.json": _signed(Metadata(timestamp), keys.every("timestamp")),
        }

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What ``timestamp.json`` in ``folder`` stands for, every signature checked; raises `PublishError`.

        Nothing that somebody slipped into the folder is ever signed again.
        """
        try:
            timestamp = Metadata[Timestamp].from_file(str(folder / "timestamp.json"))
            version = trust.read_root_version(timestamp.signed.unrecognized_fields)
            root = Metadata[Root].from_file(str(folder / f"{version}.root.json"))
            version = timestamp.signed.snapshot_meta.version
            snapshot = Metadata[Snapshot].from_file(str(folder / f"{version}.snapshot.json"))
            for role, md in (("root", root), ("timestamp", timestamp), ("snapshot", snapshot)):
                root.signed.verify_delegate(role, md.signed_bytes, md.signatures)
            found = cls(root, timestamp, snapshot, {})
            found._load_role(folder, "targets", root.signed)
            for role in found.auto_roles:
                found._load_role(folder, role, found._top)
        except (OSError, RepositoryError, ContractError, KeyError, ValueError) as e:
            raise PublishError(f"{folder}: damaged ({e}); restore it from its backup") from e
        return found

    def _load_role(self, folder: Path, name: str, delegator: Root | Targets) -> None:
        version = self._snapshot.signed.meta[f"{name}.json"].version
        md = Metadata[Targets].from_file(str(folder / f"{version}.{name}.json"))
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
        return [*roots, *targets, f"{self._snapshot.signed.version}.snapshot.json", "timestamp.json"]

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
            Draft(name="timestamp.json", metadata=self._timestamp, needs=(self.need("timestamp"),)),
        ]


def _stamp(now: datetime, root: Root) -> dict[str, int]:
    return {"signed": int(now.timestamp()), "root": root.version}


def _signed(md: Metadata[Any], signers: Iterable[CryptoSigner]) -> bytes:
    md.signatures.clear()
    for signer in signers:
        md.sign(signer, append=True)
    return md.to_bytes()
