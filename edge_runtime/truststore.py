"""What a device believes: the newest TUF metadata it has verified, and the releases it accepted. The only tuf import.

All of it is one durable record. A kill at any instant leaves it as it was or as it will be.

- *Rollback, mix-and-match*: python-tuf compares every version with the newest one verified here.
- *Freeze*: metadata expires. Where the clock is behind the newest time at which a timestamp was signed (no clock, or
  one reset to 1970), that time takes its place: such a device can be held at the newest metadata it has seen, never
  moved back.
- *A bad director*: it can only name digests, and those have to be unrevoked targets of the same model family.
- *Lost keys*: every new root is signed by the one before, from the pinned root on.
- *Fast-forward*: a thief may have signed the highest revision or a time far ahead, and no honest one would ever count
  again. So a floor belongs to the key that signed it, and falls with that key: rotating the stolen key is the remedy
  for both, as it is in TUF for versions. What only the lost key signed cannot be played back either.

Source: The Update Framework specification 1.0, section 5 (https://theupdateframework.github.io/specification/latest/).
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

from securesystemslib.signer import Signature
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, Targets
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from edge_runtime.adapters.slots import Slots
from edge_runtime.contract import codec, ids, trust
from edge_runtime.contract.errors import ContractError, SkiffError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import Digest, ModelName
from edge_runtime.contract.messages import SignedRelease, TrustBundle
from edge_runtime.contract.release import Release, from_payload

# A flood of roots ends somewhere; those on record are not counted against it, or a device would never pass the 65th.
_LIMITS: Final = UpdaterConfig(
    max_root_rotations=64,
    max_delegations=4,
    root_max_length=codec.MAX_MESSAGE_BYTES,
    timestamp_max_length=16 * 1024,
    snapshot_max_length=codec.MAX_MESSAGE_BYTES,
    targets_max_length=codec.MAX_MESSAGE_BYTES,
)
_CHECKED: Final = ("root", "timestamp", "snapshot", "targets")
_ANYBODY: Final = ""
"""Stands for the key in records that did not name one yet."""


Files = Callable[[str], bytes | None]
"""Gives a file of the repository's metadata by its name (``2.root.json``), None where there is none.

It bounds size and time itself, and says why it cannot with a `SkiffError`.
"""


class _Fetcher(FetcherInterface):
    """Metadata from wherever it comes: a name that is absent does not exist."""

    def __init__(self, file: Files) -> None:
        self._file = file

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.rpartition("/")[2]
        data = self._file(name)
        if data is None:
            raise tuf_errors.DownloadHTTPError(f"there is no {name}", 404)
        return iter((data,))


class TrustStore:
    """The record in ``folder``, for a device that was provisioned with ``pinned_root``; raises `ContractError`.

    A context manager: leaving it makes durable what was verified, also when a later step failed. python-tuf replaces
    its files one by one and does not sync them, so it works in a scratch folder that is filled from the record and read
    back into it; the record is replaced as a whole, and only when something is new.
    """

    def __init__(self, folder: Path, pinned_root: bytes) -> None:
        self._store = Slots(folder)
        self._scratch = folder / "scratch"
        self._pinned_root = pinned_root
        try:
            self.pinned_version: Final = Metadata[Root].from_bytes(pinned_root).signed.version
        except tuf_errors.RepositoryError as e:
            raise ContractError(f"the pinned root is no TUF root ({e}): provision 1.root.json anew") from e
        self._document = self._store.record() or {}
        f = Fields(self._document, str(folder))
        files = f.section("files", {})
        self._files = {name: files.text(name, max_length=codec.MAX_MESSAGE_BYTES) for name in files.names()}
        # The release accepted last, and by director key the newest of each, by cohort and model: "revision:digest".
        self._accepted = dict(f.pairs("accepted", {}))
        floors = f.section("floors", {})
        self._floors = {key: {_ANYBODY: text} for key, text in self._accepted.items()}
        self._floors |= {key: dict(floors.pairs(key)) for key in floors.names()}
        # By timestamp key, the newest time it signed, in seconds since 1970.
        self._signed = dict(f.counts("signed", {}))
        self._now = datetime.fromtimestamp(0, UTC)
        self._client: Updater | None = None
        self._targets = Targets()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._save()
            self._client = None
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def known_version(self) -> int:
        """The newest version of the root on record that the pinned one leads to: only later ones have to be fetched."""
        known = Metadata[Root].from_bytes(self._pinned_root).signed
        try:
            while text := self._files.get(f"root_history/{known.version + 1}.root.json"):
                later = Metadata[Root].from_bytes(text.encode())
                known.verify_delegate("root", later.signed_bytes, later.signatures)
                known = later.signed
        except tuf_errors.RepositoryError:
            pass  # of another repository, whose root was pinned before
        return known.version

    def refresh(self, bundle: TrustBundle) -> None:
        """Verifies a bundle; raises as `refresh_from`."""
        self.refresh_from(dict(bundle.files).get)

    def refresh_from(self, file: Files) -> None:
        """Verifies the current metadata, asking for each file that is not known yet.

        Raises `ContractError` saying what is wrong with it, and where that may come from; what ``file`` raises comes
        out as it is.
        """
        shutil.rmtree(self._scratch, ignore_errors=True)
        (self._scratch / "root_history").mkdir(parents=True)
        for name, text in self._files.items():
            (self._scratch / name).write_bytes(text.encode())
        roots = sum(name.endswith(".root.json") for name in self._files)
        try:
            self._client = Updater(
                str(self._scratch),
                "bundle:/",
                fetcher=_Fetcher(file),
                config=replace(_LIMITS, max_root_rotations=_LIMITS.max_root_rotations + roots),
                bootstrap=self._pinned_root,
            )
            self._client.refresh()
            self._check_time()
            self._targets = self._read("targets").signed
        except tuf_errors.ExpiredMetadataError as e:
            now = datetime.fromtimestamp(time.time(), UTC)
            raise ContractError(
                f"trust metadata: {e} by this device's clock ({now:%Y-%m-%d %H:%M} UTC): set the clock, or have the "
                "publisher refresh and publish its metadata"
            ) from e
        except tuf_errors.BadVersionNumberError as e:
            raise ContractError(
                f"trust metadata is older than what this device has verified before, or mixed ({e}): publish the "
                "current metadata"
            ) from e
        except (tuf_errors.RepositoryError, tuf_errors.DownloadError) as e:
            if isinstance(e.__cause__, SkiffError):  # python-tuf has no family for what a fetcher raises
                raise e.__cause__ from None
            raise ContractError(
                f"trust metadata: {e}: publish metadata that descends from the pinned root"
            ) from e

    def read_release(self, message: SignedRelease) -> Release:
        """The release in ``message``, signed by the director; raises `ContractError`. After `refresh`."""
        self._signers(message)
        return from_payload(message.payload)

    def _signers(self, message: SignedRelease) -> frozenset[str]:
        """The director keys whose signatures are good; raises `ContractError` when they are too few."""
        signatures = {keyid: Signature(keyid, signature.hex()) for keyid, signature in message.signatures}
        role = self._targets.delegations and self._targets.delegations.roles
        if not role or trust.DIRECTOR not in role:
            raise ContractError("the targets metadata names no director: nobody can sign releases")
        found = self._targets.get_verification_result(trust.DIRECTOR, message.payload, signatures)
        if not found:
            raise ContractError(
                "the release is not signed by the director whom the targets metadata names "
                f"({len(found.signed)} of {found.threshold} signatures): sign it with the current director key"
            )
        return frozenset(found.signed)

    def knows(self, release: Release, payload: bytes) -> bool:
        """Whether this very release is the one that was accepted last, by the record alone; needs no `refresh`."""
        return self._accepted.get(_key(release)) == _standing(release, payload)

    def accept(self, message: SignedRelease, *, floor: int = 0) -> Release:
        """Remembers and returns the release in ``message``; after `refresh`.

        Raises `ContractError` when the director did not sign it, or when a later one, or another of its revision, was
        accepted from a key that still signs for the director. ``floor`` is a revision that somebody else remembers: it
        counts where nothing is on record, for the record was lost.
        """
        signers = self._signers(message)
        release = from_payload(message.payload)
        mine, known = _standing(release, message.payload), self._floors.get(_key(release))
        keys = {_ANYBODY, *self._targets.get_delegated_role(trust.DIRECTOR).keyids}
        counts = [text for key, text in (known or {}).items() if key in keys]
        highest = max(map(_revision, counts), default=0 if known else floor)
        if release.revision < highest:
            raise ContractError(
                f"revision {release.revision} is older than {highest}, which was accepted here"
            )
        if mine not in counts and release.revision in map(_revision, counts):
            raise ContractError(
                f"revision {release.revision} was accepted here with other contents: raise the revision"
            )
        self._accepted[_key(release)] = mine
        self._floors[_key(release)] = {**(known or {}), **dict.fromkeys(signers, mine)}
        return release

    def is_revoked(self, digest: Digest) -> bool:
        """Whether the targets keys withdrew their approval; raises `ContractError`. After `refresh`."""
        return digest in trust.read_revoked(self._targets.unrecognized_fields)

    def find(self, model: ModelName, digest: Digest) -> trust.Target | None:
        """What is signed of ``digest`` as an approved model of this family; None when it is none.

        After `refresh`. Raises `ContractError` when metadata of a delegated role does not verify, and what the source
        of its files raises.
        """
        assert self._client is not None, "find() comes between refresh() and the end of the context"
        for path in (trust.approved_path(model, digest), trust.auto_path(model, digest)):
            try:
                target = self._client.get_targetinfo(path)
            except (tuf_errors.RepositoryError, tuf_errors.DownloadError) as e:
                if isinstance(e.__cause__, SkiffError):
                    raise e.__cause__ from None
                raise ContractError(f"trust metadata of {path}: {e}: publish the current metadata") from e
            if target is not None and target.hashes.get("sha256") == digest:
                if path == trust.auto_path(model, digest):
                    self._check_role(trust.auto_role(model))
                return trust.read_target(digest, path, target.length, target.custom)
        return None

    def _check_role(self, role: str) -> None:
        """python-tuf has asked the clock only whether a delegated role expired."""
        if f"{role}.json" in self._found() and self._read(role).signed.is_expired(self._now):
            raise ContractError(
                f"trust metadata: {role}.json is expired at {self._now:%Y-%m-%d %H:%M} UTC: have the publisher renew "
                "and publish its metadata"
            )

    def _found(self) -> dict[str, Path]:
        """The files that python-tuf verified, by their name on record."""
        paths = [*self._scratch.glob("*.json"), *self._scratch.glob("root_history/*.json")]
        return {str(p.relative_to(self._scratch)): p for p in sorted(paths) if not p.is_symlink()}

    def _read(self, role: str) -> Metadata[Any]:
        """Its file, read by ourselves: python-tuf's own reading hides a disk's `OSError` in another family."""
        return Metadata.from_bytes((self._scratch / f"{role}.json").read_bytes())

    def _save(self) -> None:
        """Both copies of the record get what is new: one that is damaged later must not take a floor along."""
        document = {
            "files": {name: path.read_bytes().decode() for name, path in self._found().items()},
            "accepted": self._accepted,
            "floors": self._floors,
            "signed": self._signed,
        }
        if document != self._document or self._store.damage:
            self._store.write_record(document)
            self._store.write_record(document)
            self._document = document

    def _check_time(self) -> None:
        """python-tuf has compared with the clock; a clock that is behind is corrected by what is known for sure."""
        root, timestamp = self._read("root").signed, self._read("timestamp")
        seconds = trust.read_signed_seconds(timestamp.signed.unrecognized_fields)
        keys = root.roles["timestamp"].keyids
        floor = max([seconds, *(self._signed.get(key, 0) for key in keys)])
        clock = time.time()
        self._now = datetime.fromtimestamp(max(floor, clock), UTC)
        for name in _CHECKED:
            if self._read(name).signed.is_expired(self._now):
                if floor <= clock:
                    raise tuf_errors.ExpiredMetadataError(f"{name}.json is expired")
                raise ContractError(
                    f"trust metadata: {name}.json is expired: metadata that was signed at "
                    f"{self._now:%Y-%m-%d %H:%M} UTC is known here. Publish current metadata; if the publisher's clock "
                    "ran ahead then, replace the timestamp key"
                )
        good = root.get_verification_result("timestamp", timestamp.signed_bytes, timestamp.signatures)
        for key in good.signed:
            self._signed[key] = max(seconds, self._signed.get(key, 0))


def _key(release: Release) -> str:
    return f"{release.cohort}/{release.model}"


def _standing(release: Release, payload: bytes) -> str:
    return f"{release.revision}:{ids.digest_of(payload)}"


def _revision(standing: str) -> int:
    return int(standing.partition(":")[0])
