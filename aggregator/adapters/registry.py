"""Published artifacts by digest: what their own metadata says, read from a folder tree and cached."""

import hashlib
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from edge_runtime.contract.errors import ArtifactError
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.manifest import ArtifactInfo, read_info

RESCAN_SECONDS: Final = 2.0
ARTIFACT: Final = re.compile(r"(?:.*\.)?([0-9a-f]{64})\.onnx")
"""``{digest}.onnx``, also behind the hash that TUF puts before a target's name."""

log = logging.getLogger(__name__)


class Registry:
    """Artifacts anywhere under ``root``.

    The tree is walked again for unknown digests, at most every `RESCAN_SECONDS`: devices name them again and again.
    """

    def __init__(self, root: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._clock = clock
        self._known: dict[Digest, ArtifactInfo] = {}
        self._bad: dict[Path, int] = {}
        self._scanned: float | None = None

    def info(self, digest: Digest, *, now: bool = False) -> ArtifactInfo | None:
        """What the artifact says about itself, None when no sound artifact of this digest is published.

        ``now`` walks the tree however short ago it was: an operator names what was published a moment before. A file
        whose bytes do not have the digest, or that is no artifact, is logged once and ignored until it is changed.
        """
        if digest not in self._known:
            self._scan(now=now)
        return self._known.get(digest)

    def _scan(self, *, now: bool) -> None:
        at = self._clock()
        if not now and self._scanned is not None and at < self._scanned + RESCAN_SECONDS:
            return
        self._scanned = at
        for path in sorted(self._root.rglob("*.onnx")):
            match = ARTIFACT.fullmatch(path.name)
            if match and match[1] not in self._known:
                self._read(path, Digest(match[1]))

    def _read(self, path: Path, digest: Digest) -> None:
        problem: object = "its bytes do not have the digest of its name"
        changed_ns = _changed_ns(path)
        if self._bad.get(path) == changed_ns:
            return
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == digest:
                self._known[digest] = read_info(data)
                return
        except (OSError, ArtifactError) as e:
            problem = e
        self._bad[path] = changed_ns
        log.warning("artifact_ignored path=%s reason=%s", path, problem)


def _changed_ns(path: Path) -> int:
    """When the file was last changed, 0 where that cannot be told."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
