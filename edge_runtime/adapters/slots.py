"""The device's models and the record of their states, safe against losing power at any instant.

Models are immutable files named by their SHA-256; the record is a small JSON document. Both become durable under their
name in one order: data flushed, renamed, folder flushed (see `disk`).
"""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from edge_runtime.adapters import disk
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ArtifactError, ContractError
from edge_runtime.contract.ids import Digest

_COPIES: Final = ("record.a.json", "record.b.json")
_READ_BYTES: Final = 1 << 20
_Read = TypeVar("_Read")

log = logging.getLogger("skiffd")


class Slots:
    """Models and their record under one folder, which is created when absent.

    One process writes the record and collects; another may fetch and install meanwhile. Two copies of the record are
    written in turn, each with its generation and checksum, so that the older one is whole while the newer is written,
    and is read when the newer is damaged.

    Layout: ``record.a.json``, ``record.b.json``, ``blobs/{digest}.onnx``, ``staging/{digest}.part``.
    """

    def __init__(self, root: Path) -> None:
        self._root: Final = root
        self._blobs: Final = root / "blobs"
        self._staging: Final = root / "staging"
        for folder in (self._blobs, self._staging):
            disk.make_folder(folder)

    # ── the record ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def damage(self) -> tuple[str, ...]:
        """What is wrong with the copies of the record, one sentence each; empty when nothing is."""
        return tuple(problem for _, _, problem in self._read_copies() if problem)

    def record(self) -> dict[str, Any] | None:
        """The newest whole copy of the record; None when none was written or none is whole (see `damage`)."""
        return self._newest()[1]

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replaces the record durably; after a crash at any instant the old or the new one is read.

        ``record`` is anything JSON can hold. Raises `OSError` when the disk refuses; the old record then still stands.
        """
        generation, _, newest = self._newest()
        name = _COPIES[1] if newest == _COPIES[0] else _COPIES[0]
        body = _canonical(record)
        document = {
            "generation": generation + 1,
            "sha256": hashlib.sha256(body).hexdigest(),
            "record": record,
        }
        disk.replace_file(self._root / name, _canonical(document))

    def _newest(self) -> tuple[int, dict[str, Any] | None, str]:
        """Generation, content and file name of the newest whole copy; 0, None and "" when there is none."""
        best: tuple[int, dict[str, Any] | None, str] = (0, None, "")
        for name, (generation, record, _) in zip(_COPIES, self._read_copies(), strict=True):
            if record is not None and generation > best[0]:
                best = (generation, record, name)
        return best

    def _read_copies(self) -> list[tuple[int, dict[str, Any] | None, str]]:
        return [_read_copy(self._root / name) for name in _COPIES]

    # ── models ─────────────────────────────────────────────────────────────────────────────────────────

    def blob(self, digest: Digest) -> Path:
        """Where the installed model with this digest is, or would be."""
        return self._blobs / f"{ids.digest(digest)}.onnx"

    def has(self, digest: Digest, *, verify: bool = False) -> bool:
        """Whether the model is installed; with ``verify``, whether its bytes can be read and still have this digest.

        A file that cannot be read is left where it is: a download takes its place when that is whole.
        """
        path = self.blob(digest)
        try:
            return path.is_file() and (not verify or _hash_file(path) == digest)
        except OSError as e:
            log.warning("model_unreadable path=%s reason=%s", path, e.strerror)
            return False

    def staging(self, digest: Digest) -> Path:
        """Where a download of this model is collected; what is there survives a restart."""
        return self._staging / f"{ids.digest(digest)}.part"

    def install(self, digest: Digest) -> Path:
        """Turns a finished download into an installed model, durably, and returns its path.

        A model that is installed and whole stays as it is. Raises `ArtifactError` when nothing was downloaded, when it
        cannot be read, or when its SHA-256 is another; the download is then deleted, for resuming it could only fail
        again. Raises `OSError` when the disk refuses.
        """
        target, source = self.blob(digest), self.staging(digest)
        if not source.is_file():
            if self.has(digest, verify=True):
                return target
            raise ArtifactError(f"model {digest}: nothing was downloaded to {source}")
        try:
            found = _hash_file(source)
        except OSError as e:
            raise ArtifactError(
                f"model {digest}: the download cannot be read ({e.strerror}) and {self._dropped(digest)}"
            ) from e
        if found != digest:
            source.unlink()
            raise ArtifactError(
                f"model {digest}: the download has SHA-256 {found} and was deleted; fetch it again"
            )
        disk.move_file(source, target)
        return target

    def drop(self, digest: Digest) -> None:
        """Deletes what was downloaded of this model so far; raises `OSError`."""
        self.staging(digest).unlink(missing_ok=True)

    def _dropped(self, digest: Digest) -> str:
        try:
            self.drop(digest)
        except OSError as e:
            return f"cannot be deleted either ({e.strerror}): check the disk"
        return "was deleted; fetch it again"

    def collect(self, keep: Collection[Digest]) -> list[Digest]:
        """Deletes models and downloads whose digest is not in ``keep``; returns the models deleted, sorted."""
        gone: list[Digest] = []
        for path in sorted(self._blobs.glob("*.onnx")):
            digest = _named(path)
            if digest is not None and digest not in keep:
                path.unlink()
                gone.append(digest)
        for path in self._staging.glob("*.part"):
            if _named(path) not in keep:
                path.unlink()
        return gone


def _named(path: Path) -> Digest | None:
    try:
        return ids.digest(path.stem)
    except ContractError:
        return None


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _read_copy(path: Path) -> tuple[int, dict[str, Any] | None, str]:
    """Generation and content of one copy, or why there is none ("" when it was never written)."""
    try:
        data = _twice(path.read_bytes)
    except FileNotFoundError:
        return 0, None, ""
    except OSError as e:
        return 0, None, f"{path}: cannot be read ({e.strerror})"
    try:
        document = json.loads(data)
        generation, record = document["generation"], document["record"]
        whole = hashlib.sha256(_canonical(record)).hexdigest() == document["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        return 0, None, f"{path}: not a record ({type(e).__name__}: {e})"
    if not whole or not isinstance(generation, int) or not isinstance(record, dict):
        return 0, None, f"{path}: the checksum does not match"
    return generation, record, ""


def _twice(read: Callable[[], _Read]) -> _Read:
    """A worn sector may read well the second time.

    The record's copy before knows less, no quarantine that came since, and a model costs its download.
    """
    try:
        return read()
    except FileNotFoundError:
        raise
    except OSError:
        return read()


def _hash_file(path: Path) -> str:
    return _twice(lambda: _hash_once(path))


def _hash_once(path: Path) -> str:
    h = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            h.update(chunk)
    return h.hexdigest()
