"""``python -m tests.support.serve_stdio model.onnx``: the stdio feed around one model, as the daemon runs it.

What the runtime saw goes to stderr at the end, as JSON. SIGTERM ends it.
"""

import json
import signal
import sys
import threading
from collections.abc import Sequence

from edge_runtime.adapters.sources.stdio import StdioSource
from edge_runtime.feed import Feed
from edge_runtime.runtime import Runtime


def main(arguments: Sequence[str]) -> int:
    """Serves until the input ends."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    runtime = Runtime(arguments[0])
    feed = Feed(StdioSource(max_line_bytes=4096), stop)
    feed.attach(runtime)
    feed.start()
    while not feed.done.wait(0.05):  # a signal is handled between two waits
        pass
    seen = runtime.take_window()
    document = {
        "rows": seen.rows,
        "labelled": seen.labelled,
        "correct": seen.correct,
        "answered": feed.answered,
        "refused": feed.refused,
        "queued": seen.queueing.count,
        "stopped": stop.is_set(),
    }
    sys.stderr.write(json.dumps(document) + "\n")
    return 1 if feed.failure else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
