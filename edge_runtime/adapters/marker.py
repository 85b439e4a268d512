"""One bit that a child sets and its parent reads, also after a crash of the child."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_SET: Final = b"\x01"
_CLEAR: Final = b"\x00"


class Marker:
    """A byte of a file in memory (memfd_create(2)) that both processes have open; clear at first."""

    def __init__(self, handle: int) -> None:
        """Takes over a file that `make` made, in the parent or, inherited, in the child."""
        self.handle: Final = handle

    @classmethod
    def make(cls) -> "Marker":
        """A new one; raises `OSError`."""
        return cls(os.memfd_create("skiff-marker"))

    @property
    def is_set(self) -> bool:
        """Whether the child was `within` when it was last heard of."""
        return os.pread(self.handle, 1, 0) == _SET

    @contextmanager
    def within(self) -> Iterator[None]:
        """Set while this is not left; a process that dies inside leaves it set."""
        os.pwrite(self.handle, _SET, 0)
        try:
            yield
        finally:
            os.pwrite(self.handle, _CLEAR, 0)

    def close(self) -> None:
        """Lets go of the file; the other process keeps it."""
        os.close(self.handle)
