"""What a device believes: the newest TUF metadata it has verified, and the releases it accepted. The only tuf import.

All of it is one durable record. A kill at any instant leaves it as it was or as it will be.

- *Rollback, mix-and-match*: python-tuf compares every version with the newest one verified here.
- *Freeze*: metadata expires. Where the clock is behind the time at which the timestamp was signed (no clock, or one
  reset to 1970), that time takes its place: such a device can be held at the newest metadata it has seen, never moved
  back.
- *A bad director*: it can only name digests, and those have to be unrevoked targets of the same model family.
- *Lost keys*: every new root is signed by the one before, from the pinned root on.

Source: The Update Framework specification 1.0, section 5 (https://theupdateframework.github.io/specification/latest/).
"""

import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

from securesystemslib.signer import Signature
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, Targets, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from edge_runtime.adapters.slots import Slots
from edge_runtime.contract import codec, ids, trust
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import Digest, ModelName
from edge_runtime.contract.messages import SignedRelease, TrustBundle
from edge_runtime.contract.release import Release, from_payload

_LIMITS: Final = UpdaterConfig(
    max_root_rotations=64,
    max_delegations=4,
    root_max_length=codec.MAX_MESSAGE_BYTES,
    timestamp_max_length=16 * 1024,
    snapshot_max_length=codec.MAX_MESSAGE_BYTES,
    targets_max_length=codec.MAX_MESSAGE_BYTES,
)
_CHECKED: Final = ("root", "timestamp", "snapshot", "targets")


class _BundleFetcher(FetcherInterface):
    """Metadata out of a bundle: a name that is absent does not exist."""

    def __init__(self, bundle: TrustBundle) -> None:
        self._files = dict(bundle.files)

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.rpartition("/")[2]
        if name not in self._files:
            raise tuf_errors.DownloadHTTPError(f"the bundle holds no {name}", 404)
        return iter((self._files[name],))


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
        self._accepted = dict(f.pairs("accepted", {}))
        self._client: Updater | None = None
        self._targets = Targets()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._save()
            self._client = None
        shutil.rmtree(self._scratch, ignore_errors=True)

    def refresh(self, bundle: TrustBundle) -> None:
        """Verifies a bundle; raises `ContractError` saying what is wrong with it, and where that may come from."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        (self._scratch / "root_history").mkdir(parents=True)
        for name, text in self._files.items():
            (self._scratch / name).write_text(text, encoding="utf-8")
        try:
            self._client = Updater(
                str(self._scratch),
                "bundle:/",
                fetcher=_BundleFetcher(bundle),
                config=_LIMITS,
                bootstrap=self._pinned_root,
            )
            self._client.refresh()
            self._check_expiry()
            self._targets = Metadata[Targets].from_file(str(self._scratch / "targets.json")).signed
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
            raise ContractError(
                f"trust metadata: {e}: publish metadata that descends from the pinned root"
            ) from e

    def read_release(self, message: SignedRelease) -> Release:
        """The release in ``message``, signed by the director; raises `ContractError`. After `refresh`."""
        signatures = {keyid: Signature(keyid, signature.hex()) for keyid, signature in message.signatures}
        try:
            self._targets.verify_delegate(trust.DIRECTOR, message.payload, signatures)
        except (tuf_errors.UnsignedMetadataError, ValueError) as e:
            raise ContractError(
                f"the release is not signed by the director whom the targets metadata names ({e}): sign it with the "
                "current director key"
            ) from e
        return from_payload(message.payload)

    def accept(self, release: Release, payload: bytes) -> None:
        """Remembers a release; raises `ContractError` when a later one, or another of its revision, was accepted."""
        key, digest = f"{release.cohort}/{release.model}", ids.digest_of(payload)
        revision, _, known = self._accepted.get(key, "0:").partition(":")
        if release.revision < int(revision):
            raise ContractError(
                f"revision {release.revision} is older than {revision}, which was accepted here"
            )
        if release.revision == int(revision) and known != digest:
            raise ContractError(
                f"revision {revision} was accepted here with other contents: raise the revision"
            )
        self._accepted[key] = f"{release.revision}:{digest}"

    def is_revoked(self, digest: Digest) -> bool:
        """Whether the targets keys withdrew their approval; raises `ContractError`. After `refresh`."""
        return digest in trust.read_revoked(self._targets.unrecognized_fields)

    def find(self, model: ModelName, digest: Digest) -> int | None:
        """The length in bytes of ``digest`` as an approved model of this family; None when it is none.

        After `refresh`. Raises `ContractError` when metadata of a delegated role does not verify.
        """
        assert self._client is not None, "find() comes between refresh() and the end of the context"
        for path in (trust.approved_path(model, digest), trust.auto_path(model, digest)):
            try:
                target = self._client.get_targetinfo(path)
            except (tuf_errors.RepositoryError, tuf_errors.DownloadError) as e:
                raise ContractError(f"trust metadata of {path}: {e}: publish the current metadata") from e
            if target is not None and target.hashes.get("sha256") == digest:
                return target.length
        return None

    def _save(self) -> None:
        paths = [*self._scratch.glob("*.json"), *self._scratch.glob("root_history/*.json")]
        found = {str(p.relative_to(self._scratch)): p for p in paths if not p.is_symlink()}
        document = {
            "files": {name: path.read_text(encoding="utf-8") for name, path in sorted(found.items())},
            "accepted": self._accepted,
        }
        if document != self._document:
            self._store.write_record(document)

    def _check_expiry(self) -> None:
        """python-tuf has compared with the clock; a clock that is behind is corrected by what is known for sure."""
        timestamp = Metadata[Timestamp].from_file(str(self._scratch / "timestamp.json")).signed
        signed_seconds = trust.read_signed_seconds(timestamp.unrecognized_fields)
        now = datetime.fromtimestamp(max(signed_seconds, time.time()), UTC)
        for name in _CHECKED:
            signed: Any = Metadata.from_file(str(self._scratch / f"{name}.json")).signed
            if signed.is_expired(now):
                raise tuf_errors.ExpiredMetadataError(f"{name}.json is expired")
