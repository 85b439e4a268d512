"""``skiffd`` that kills itself: ``doomed.py CONFIG MODULE:NAME before|after N``, at the N-th call of a function.

The process then says so on stderr and is gone (SIGKILL) before or after the real function was called; nothing in it
gets to run any more. All else is the real ``skiffd``.
"""

import functools
import importlib
import itertools
import json
import os
import signal
import sys
from typing import Any

from edge_runtime import skiffd

EVENT = "doomed"
"""What the last line says."""


def doom(target: str, when: str, nth: int) -> None:
    """Puts the end of this process before or after the ``nth`` call of ``target``, ``module:function`` or a method."""
    module, _, name = target.partition(":")
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for step in path:
        owner = getattr(owner, step)
    real = getattr(owner, last)
    calls = itertools.count(1)

    def die() -> None:
        line = {"event": EVENT, "detail": f"point={target} when={when}"}
        os.write(2, json.dumps(line).encode() + b"\n")
        os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(real)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        now = next(calls) == nth
        if now and when == "before":
            die()
        result = real(*args, **kwargs)
        if now and when == "after":
            die()
        return result

    setattr(owner, last, wrapped)


def main() -> int:
    """See the module."""
    config, target, when, nth = sys.argv[1:]
    importlib.import_module("edge_runtime.daemon")  # what others imported by name is wrapped where it is used
    doom(target, when, int(nth))
    return skiffd.main([config])


if __name__ == "__main__":
    sys.exit(main())
