"""The telemetry store: append many windows in one transaction, each counted once for ever; merge and count by filter.

A window is kept as the bytes that came; the columns that questions filter and add up by stand in a table of
their own, which stays small to scan. A window's key is (device, session, seq); a merged record covers
``seq_lo`` to ``seq``, and no two stored records of a session and model overlap. It counts as the windows it was merged
from. What is older than the retention is rolled up by device, artifact and day (`retention`).
"""

from pathlib import Path
from typing import Final

from aggregator.adapters.database import File
from aggregator.adapters.windows.answers import Answers
from aggregator.adapters.windows.append import MAX_LETTER_BYTES, Append
from aggregator.adapters.windows.retention import Retention
from aggregator.adapters.windows.schema import SCHEMA, STEPS, VERSION

__all__ = ["MAX_LETTER_BYTES", "VERSION", "Windows"]

LOG_PAGES: Final = 4000
"""Of 4 kB, after which the log is folded back into the file: a batch touches the same pages of its indexes as the
batches before, and each folding waits for the disk twice.
"""


class Windows(Append, Retention, Answers):
    """The store at ``path``; ``read_only`` for another process that only asks. Not thread-safe.

    ``dead_letters`` bounds how many bad messages are kept; the oldest make room. Methods raise `StoreError`, with
    nothing stored, when the disk fails.

    Raises:
        ConfigError: it cannot be opened, is not there (read-only), or is of another version.
    """

    def __init__(self, path: Path, *, read_only: bool = False, dead_letters: int = 1000) -> None:
        super().__init__(File(path, SCHEMA, VERSION, read_only=read_only, steps=STEPS))
        self._max_letters = dead_letters
        if not read_only:
            self._db.rows(f"PRAGMA wal_autocheckpoint={LOG_PAGES}")

    def close(self) -> None:
        """Closes the file; a writer folds the log back into it."""
        self._db.close()
