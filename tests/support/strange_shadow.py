"""``python -m tests.support.strange_shadow``: the shadow's child, in which one of its two models behaves strangely.

``STRANGE_MODEL`` in the environment is its digest, ``STRANGE_WAY`` what it does: see `WAYS`.
"""

import errno
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from edge_runtime import shadow
from edge_runtime.contract.errors import ArtifactError, BudgetExceeded
from edge_runtime.engine import Engine

MANY_ROWS: Final = 10
"""The shadow's batches are larger; what an engine runs while it is built is smaller."""
PADDING_BYTES: Final = 32 << 30
"""Of address space, which costs nothing."""
WAYS: Final = ("crash_loading", "crash", "fail", "exceed", "waste_time", "waste_cpu", "pad", "nice")

_CLOCKS: Final[dict[str, Callable[[], float]]] = {
    "waste_time": time.monotonic,
    "waste_cpu": time.process_time,
}
_padding: list[mmap.mmap] = []


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


class _Slow:
    """A session whose runs take half a second on one of the clocks."""

    def __init__(self, session: Any, clock: Callable[[], float]) -> None:
        self._session = session
        self._clock = clock

    def run(self, *args: Any) -> Any:
        until = self._clock() + 0.5
        while self._clock() < until:
            time.sleep(0.0 if self._clock is time.process_time else 0.1)
        return self._session.run(*args)


def _pad() -> None:
    """Every model takes so much, and says as ONNX Runtime does that there is no more."""
    try:
        _padding.append(mmap.mmap(-1, PADDING_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0))
    except OSError as e:
        raise BudgetExceeded(f"the model does not fit ({e.strerror})") from e


def _denied(_: int) -> int:
    """What a service's filter of system calls makes of it."""
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def main() -> int:
    """The shadow's own entry point."""
    strange, way = os.environ["STRANGE_MODEL"], os.environ["STRANGE_WAY"]
    assert way in WAYS
    if way == "nice":
        os.nice = _denied
    build, run = Engine.__init__, Engine._run_part

    def built(self: Engine, *args: Any, **options: Any) -> None:
        if way == "pad":
            _pad()
        if way == "crash_loading" and options["expect"] == strange:
            _crash()
        build(self, *args, **options)

    def ran(self: Engine, session: Any, rows: Any) -> Any:
        if self.digest == strange and len(rows) >= MANY_ROWS:
            if way == "crash":
                _crash()
            elif way == "fail":
                raise ArtifactError("the graph failed on many rows")
            elif way == "exceed":
                raise BudgetExceeded("many rows do not fit into memory")
            elif way in _CLOCKS:
                session = _Slow(session, _CLOCKS[way])
        return run(self, session, rows)

    Engine.__init__ = built  # type: ignore[method-assign]
    Engine._run_part = ran  # type: ignore[method-assign]
    return shadow.main()


if __name__ == "__main__":
    sys.exit(main())
