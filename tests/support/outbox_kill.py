"""Kills an outbox at one step after the other: ``outbox_kill.py BASE OUT ACTION STEP``.

For n = STEP, 2 STEP, … a copy of the folder BASE becomes OUT/n; a child opens the outbox in it, performs ACTION and is
killed (SIGKILL) when SQLite has taken n steps of its virtual machine, opening included. Ends with the first child that
gets through; prints how many were killed. A process of its own, so that nothing else is forked.
"""

import json
import os
import shutil
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

from edge_runtime.adapters.outbox import Outbox
from edge_runtime.core import rollup


def perform(folder: Path, action: dict[str, Any]) -> None:
    """Opens the outbox in ``folder`` and does what ``action`` says."""
    outbox = Outbox(
        folder / "outbox.db", max_bytes=action["max_bytes"], merge=rollup.merge, choose=rollup.choose
    )
    for name, *arguments in action["do"]:
        match name:
            case "append":
                session, seq, topic, payload = arguments
                outbox.append(session, seq, topic, bytes.fromhex(payload))
            case "mark_sent":
                outbox.mark_sent([tuple(key) for key in arguments[0]])
            case "trim":
                outbox.trim(*arguments)
            case "settle":
                outbox.settle(outbox.gaps())
    outbox.close()


def killed(folder: Path, action: dict[str, Any], step: int) -> bool:
    """Whether a child that does it is killed before it is through."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
            raise SystemExit(f"the child failed at step {step}")
        return os.WIFSIGNALED(status)
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    connect = sqlite3.connect

    def watched(*args: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **options)
        connection.set_progress_handler(count, 1)
        return connection

    sqlite3.connect = watched  # type: ignore[assignment] # only in this child
    code = 1
    try:
        perform(folder, action)
        code = 0
    finally:
        os._exit(code)


def main() -> None:
    """See the module."""
    base, out, action, stride = (
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        json.loads(sys.argv[3]),
        int(sys.argv[4]),
    )
    count = 0
    while True:
        step = stride * (count + 1)
        folder = out / str(step)
        shutil.copytree(base, folder)
        if not killed(folder, action, step):
            break
        count += 1
    print(count)


if __name__ == "__main__":
    main()
