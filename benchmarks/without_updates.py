"""``skiffd`` without its update agent, to see what that weighs: ``python -m benchmarks.without_updates CONFIG``.

Nothing listens for releases, remembers them, or can start an update child. What serving needs of the same modules (the
slots' record and its rules) stays.
"""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


class Updates:
    """What the daemon asks of `edge_runtime.updates.Updates`, and no more."""

    running = False

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def listen(self) -> Iterator[Any]:
        """Nothing is ever said."""
        return iter(())

    def kill(self) -> None:
        """There is nothing to end."""


def main() -> int:
    """Entry point."""
    stub = ModuleType("edge_runtime.updates")
    stub.Updates = Updates  # type: ignore[attr-defined] # that is the point
    sys.modules["edge_runtime.updates"] = stub
    from edge_runtime import skiffd  # noqa: PLC0415 (after the stub is in place)

    return skiffd.main()


if __name__ == "__main__":
    sys.exit(main())
