"""A TUF repository that says whatever a test wants, properly signed, and a client of it: `TrustStore`.

`trainer.publish.Repository` cannot lie; this one can. Roles are python-tuf's own values: a test changes them and
publishes, and every file that was ever published stays where it was until the test takes it away.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from urllib.parse import quote

import pytest
from securesystemslib.signer import CryptoSigner
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
from tuf.ngclient._internal import trusted_metadata_set

from edge_runtime.adapters.slots import Slots
from edge_runtime.contract import trust
from edge_runtime.contract.ids import Digest, ModelName
from edge_runtime.truststore import TrustStore

T = TypeVar("T")
TOP = ("root", "targets", "snapshot", "timestamp")
LIFE = timedelta(days=30)


def set_clock(monkeypatch: pytest.MonkeyPatch, now: datetime) -> None:
    """What python-tuf and the trust store take for the time from here on."""

    class Fixed(datetime):
        @classmethod
        def now(cls, tz=None):
            return now.astimezone(tz)

    shim = SimpleNamespace(datetime=Fixed, timezone=trusted_metadata_set.datetime.timezone)
    monkeypatch.setattr(trusted_metadata_set, "datetime", shim)
    monkeypatch.setattr("edge_runtime.truststore.time.time", now.timestamp)


class TufRepository:
    """Four roles with one Ed25519 key each, published as version 1; delegated roles as a test wishes.

    ``files`` is what a client may fetch, by name. With ``hashes``, snapshot and timestamp name hash and length of what
    they list.
    """

    def __init__(self, now: datetime | None = None) -> None:
        self.now = now or datetime.now(UTC)
        expires = self.now + LIFE
        self.root = Root(expires=expires, consistent_snapshot=True)
        self.timestamp = Timestamp(expires=expires)
        self.snapshot = Snapshot(expires=expires)
        self.targets = Targets(expires=expires)
        self.delegated: dict[str, Targets] = {}
        self.signers: dict[str, list[CryptoSigner]] = {}
        self.files: dict[str, bytes] = {}
        self.hashes = False
        for role in TOP:
            self.add_key(role)
            self.roles[role].version = 0
        self.publish(*TOP)

    @property
    def pinned_root(self) -> bytes:
        return self.files["1.root.json"]

    # ── keys ───────────────────────────────────────────────────────────────────────────────────────────

    def add_key(
        self, role: str, signer: CryptoSigner | None = None, *, delegator: str = "root"
    ) -> CryptoSigner:
        """One more key for ``role``, which also signs from now on."""
        signer = signer or CryptoSigner.generate_ed25519()
        self.roles[delegator].add_key(signer.public_key, role)
        self.signers.setdefault(role, []).append(signer)
        return signer

    def rotate(self, role: str) -> None:
        """Another key in the place of all others."""
        for keyid in list(self.root.roles[role].keyids):
            self.root.revoke_key(keyid, role)
        self.signers[role] = []
        self.add_key(role)

    # ── roles ──────────────────────────────────────────────────────────────────────────────────────────

    @property
    def roles(self) -> dict[str, Any]:
        """Every role by its name."""
        top = {name: getattr(self, name) for name in TOP}
        return {**top, **self.delegated}

    def delegate(
        self, delegator: str, name: str, *paths: str, terminating: bool = False, life: timedelta = LIFE
    ) -> None:
        """Lets ``name``, which need not exist yet, vouch for ``paths``."""
        by = self.roles[delegator]
        by.delegations = by.delegations or Delegations({}, {})
        by.delegations.roles[name] = DelegatedRole(name, [], 1, terminating, list(paths))
        if name not in self.delegated:
            self.delegated[name] = Targets(expires=self.now + life)
            self.delegated[name].version = 0
            self.add_key(name, delegator=delegator)
        else:
            for signer in self.signers[name]:
                by.add_key(signer.public_key, name)

    def add_model(self, role: str, model: str, data: bytes, *, digest: str = "") -> Digest:
        """``role`` vouches for ``data`` as a model, under its digest or under another's."""
        found = Digest(digest or sha256(data).hexdigest())
        path = trust.approved_path(ModelName(model), found)
        self.roles[role].targets[path] = TargetFile.from_data(path, data, ["sha256"])
        return found

    # ── files ──────────────────────────────────────────────────────────────────────────────────────────

    def signed(self, role: str) -> bytes:
        """The role as it is now, signed by its signers."""
        if role == "timestamp":
            self.timestamp.unrecognized_fields[trust.TABLE] = {
                "signed": int(self.now.timestamp()),
                "root": self.root.version,
            }
        md = Metadata(self.roles[role])
        for signer in self.signers[role]:
            md.sign(signer, append=True)
        return md.to_bytes()

    def publish(self, *roles: str) -> None:
        """New versions of ``roles``, in this order; whoever lists a role learns of it, but is not published."""
        for role in roles:
            signed = self.roles[role]
            signed.version += 1
            self.offer(role)

    def offer(self, role: str, *, version: int | None = None) -> None:
        """Signs the role as it is and puts it under the name of its own version, or of another."""
        data = self.signed(role)
        number = version or self.roles[role].version
        encoded = quote(role, "")
        self.files["timestamp.json" if role == "timestamp" else f"{number}.{encoded}.json"] = data
        known = MetaFile(number)
        if self.hashes:
            known = MetaFile(number, len(data), {"sha256": sha256(data).hexdigest()})
        if role == "snapshot":
            self.timestamp.snapshot_meta = known
        elif role not in TOP or role == "targets":
            self.snapshot.meta[f"{role}.json"] = known


class TufClient:
    """A device's trust store, in a fresh process each time, as far as a test can see.

    ``asked`` has the names that the last refresh asked for, ``trusted`` the versions that are on record.
    """

    def __init__(self, folder: Path, repository: TufRepository, *, pinned: bytes | None = None) -> None:
        self._folder = folder
        self._repository = repository
        self.pinned = pinned or repository.pinned_root
        self.asked: list[str] = []

    def refresh(self) -> None:
        """Looks at the repository; raises `ContractError`."""
        self.ask(lambda store: None)

    def ask(self, question: Callable[[TrustStore], T]) -> T:
        """Looks at the repository and asks something; raises `ContractError`."""
        self.asked = []

        def file(name: str) -> bytes | None:
            self.asked.append(name)
            return self._repository.files.get(name)

        with TrustStore(self._folder, self.pinned) as store:
            store.refresh_from(file)
            return question(store)

    def find(self, model: str, digest: str) -> int | None:
        """The length of a model that somebody vouches for, after a refresh."""
        found = self.ask(lambda store: store.find(ModelName(model), Digest(digest)))
        return None if found is None else found.length

    @property
    def files(self) -> dict[str, str]:
        """What is on record, by name."""
        record = Slots(self._folder).record()
        return {} if record is None else record["files"]

    @property
    def trusted(self) -> dict[str, int]:
        """Versions by role, of the roots the newest."""
        found: dict[str, int] = {}
        for name, text in self.files.items():
            signed: Any = Metadata.from_bytes(text.encode()).signed
            role = "root" if "root" in name else name.removesuffix(".json")
            found[role] = max(signed.version, found.get(role, 0))
        return found
