"""Lives a story and writes down what its recorder saw: ``python -m tests.support.crash_traced FOLDER OUT``.

A process of its own, so that strace sees it from its first call to its last.
"""

import json
import sys
from pathlib import Path

from tests.support.crash_bench import Bench
from tests.support.crash_story import Story
from tests.support.recorder import (
    Change,
    Create,
    Link,
    MakeFolder,
    Remove,
    Rename,
    Sync,
    SyncFolder,
    Truncate,
    Write,
)

Call = tuple[str, ...]


def call(change: Change) -> Call:
    """A change as the system call that makes it."""
    match change:
        case Create():
            return ("create", change.path)
        case Write():
            return ("write", change.path, str(len(change.data)))
        case Truncate():
            return ("truncate", change.path, str(change.size))
        case Sync() | SyncFolder():
            return ("sync", change.path)
        case Rename():
            return ("rename", change.path, change.target)
        case Remove():
            return ("remove", change.path)
        case MakeFolder():
            return ("mkdir", change.path)
        case Link():
            return ("symlink", change.path)


def main() -> None:
    """See the module."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    story = Story(Bench.make(folder / "bench"), folder / "home", seed=0)
    story.live()
    out.write_text(json.dumps([call(change) for change in story.life.recorder.changes]), encoding="utf-8")


if __name__ == "__main__":
    main()
