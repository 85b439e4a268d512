"""What a question costs in SQLite's own steps, which are the same on any machine."""

from collections.abc import Callable

from aggregator.adapters.windows import Windows

GRAIN = 100


def steps(store: Windows, perform: Callable[[], object]) -> int:
    """How many hundreds of SQLite's virtual machine's steps ``perform`` takes."""
    taken: list[None] = []
    store._db._db.set_progress_handler(lambda: taken.append(None), GRAIN)
    perform()
    store._db._db.set_progress_handler(None, 0)
    return len(taken)
