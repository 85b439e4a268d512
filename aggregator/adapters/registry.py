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
    """Artifacts anywhere under ``root``. The tree is walked again, at most every `RESCAN_SECONDS`, for
    unknown digests.
    """

    def __init__(self, root: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._clock = clock
        self._known: dict[Digest, ArtifactInfo] = {}
        self._bad: set[Path] = set()
        self._scanned: float | None = None

    def info(self, digest: Digest) -> ArtifactInfo | None:
        """What the artifact says about itself, None when no sound artifact of this digest is published.

        A file whose bytes do not have the digest, or that is no artifact, is logged once and ignored.
        """
        if digest not in self._known:
            self._scan()
        return self._known.get(digest)

    def _scan(self) -> None:
        now = self._clock()
        if self._scanned is not None and now < self._scanned + RESCAN_SECONDS:
            return
        self._scanned = now
        for path in sorted(self._root.rglob("*.onnx")):
            match = ARTIFACT.fullmatch(path.name)
            if match and match[1] not in self._known and path not in self._bad:
                self._read(path, Digest(match[1]))

    def _read(self, path: Path, digest: Digest) -> None:
        problem: object = "its bytes do not have the digest of its name"
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == digest:
                self._known[digest] = read_info(data)
                return
        except (OSError, ArtifactError) as e:
            problem = e
        self._bad.add(path)
        log.warning("artifact_ignored path=%s reason=%s", path, problem)
