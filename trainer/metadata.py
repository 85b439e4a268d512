"""The signed metadata of a repository as one value: read and verified, changed, signed. The trainer's only tuf import.

Source: The Update Framework specification 1.0 (https://theupdateframework.github.io/specification/latest/), with
consistent snapshots. Our own fields in it are described in `edge_runtime.contract.trust`.
"""

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime, timedelta
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

from edge_runtime.contract import trust
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import Digest, ModelName
from trainer.keyring import Keyring, PublishError, threshold

ONLINE_LIFE: Final = timedelta(days=7)
"""How long snapshot and timestamp are believed."""
OFFLINE_LIFE: Final = timedelta(days=365)
"""How long root and targets roles are believed."""


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
        self._files: dict[str, bytes] = {}

    @classmethod
    def first(cls, keys: Keyring, now: datetime) -> dict[str, bytes]:
        """Version 1 of every file, the timestamp last."""
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
        if role == trust.DIRECTOR:
            return self._delegations[role].keyids
        return self._root.signed.roles[role].keyids

    def file_names(self, root_version: int) -> list[str]:
        """The files that whoever trusts the root of ``root_version`` needs."""
        roots = [f"{v}.root.json" for v in range(root_version + 1, self.root_version + 1)]
        targets = [f"{md.signed.version}.{name}.json" for name, md in self._targets.items()]
        return [*roots, *targets, f"{self._snapshot.signed.version}.snapshot.json", "timestamp.json"]

    # ── changing, before `sign` ────────────────────────────────────────────────────────────────────────

    def add_target(self, role: str, path: str, data: bytes, custom: Mapping[str, str]) -> None:
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

    def delegate(self, model: ModelName, builder: CryptoSigner) -> str:
        """Lets ``builder`` vouch for automatic models of a family; returns the role's name."""
        name = trust.auto_role(model)
        pattern = trust.auto_pattern(model)
        self._delegations[name] = DelegatedRole(name, [], 1, terminating=True, paths=[pattern])
        self._top.add_key(builder.public_key, name)
        self._targets[name] = Metadata(Targets())
        return name

    def undelegate(self, model: ModelName) -> None:
        """Takes `delegate` back."""
        name = trust.auto_role(model)
        self._name_keys(self._top, name, [])
        del self._delegations[name]
        del self._targets[name]

    def replace_keys(self, role: str, fresh: list[CryptoSigner], keys: Keyring, now: datetime) -> list[str]:
        """Names ``fresh`` keys for ``role``; returns the targets roles that have to be signed again for it."""
        if role not in self._root.signed.roles:
            delegated = [role] if role == trust.DIRECTOR else list(self.auto_roles)
            for name in delegated:
                self._name_keys(self._top, name, fresh)
            return ["targets", *(delegated if role == "builder" else [])]
        before = self.keyids("root").copy()
        self._name_keys(self._root.signed, role, fresh)
        self.next_root(before, keys, now, fresh if role == "root" else [])
        return ["targets"] if role == "targets" else []

    def next_root(
        self, before: Collection[str], keys: Keyring, now: datetime, fresh: Iterable[CryptoSigner] = ()
    ) -> None:
        """Makes a new version of the root, signed by the root keys named ``before`` and by ``fresh`` ones."""
        signers = keys.signers("root", before, purpose="a new root")
        self._root.signed.version += 1
        self._root.signed.expires = now + OFFLINE_LIFE
        self._files[f"{self.root_version}.root.json"] = _signed(self._root, [*signers, *fresh])

    @staticmethod
    def _name_keys(delegator: Root | Targets, role: str, signers: Iterable[CryptoSigner]) -> None:
        for keyid in list(delegator.get_delegated_role(role).keyids):
            delegator.revoke_key(keyid, role)
        for signer in signers:
            delegator.add_key(signer.public_key, role)

    # ── signing ────────────────────────────────────────────────────────────────────────────────────────

    def sign(self, changed: Iterable[str], keys: Keyring, now: datetime, *, purpose: str) -> dict[str, bytes]:
        """New versions of the ``changed`` targets roles, of the snapshot and of the timestamp, which comes last.

        Raises `PublishError` when a key is missing; ``purpose`` tells what for.
        """

        def sign(md: Metadata[Any], role: str, life: timedelta) -> bytes:
            md.signed.expires = now + life
            return _signed(md, keys.signers(role, self.keyids(role), purpose=purpose))

        files = self._files
        snapshot, timestamp = self._snapshot.signed, self._timestamp.signed
        for name in changed:
            md = self._targets[name]
            before = snapshot.meta.get(f"{name}.json")
            md.signed.version = before.version + 1 if before else 1
            snapshot.meta[f"{name}.json"] = MetaFile(md.signed.version)
            role = "targets" if name == "targets" else "builder"
            files[f"{md.signed.version}.{name}.json"] = sign(md, role, OFFLINE_LIFE)
        snapshot.version += 1
        files[f"{snapshot.version}.snapshot.json"] = sign(self._snapshot, "snapshot", ONLINE_LIFE)
        timestamp.version += 1
        timestamp.snapshot_meta.version = snapshot.version
        timestamp.unrecognized_fields[trust.TABLE] = _stamp(now, self._root.signed)
        files["timestamp.json"] = sign(self._timestamp, "timestamp", ONLINE_LIFE)
        return files


def _stamp(now: datetime, root: Root) -> dict[str, int]:
    return {"signed": int(now.timestamp()), "root": root.version}


def _signed(md: Metadata[Any], signers: Iterable[CryptoSigner]) -> bytes:
    md.signatures.clear()
    for signer in signers:
        md.sign(signer, append=True)
    return md.to_bytes()
