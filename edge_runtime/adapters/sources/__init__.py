"""Where rows come from when no application calls `Runtime.predict` itself, and where their answers go."""

import threading
from typing import Protocol

from edge_runtime.adapters.sources.ndjson import Answerer


class Source(Protocol):
    """Something rows come from, and their answers go to where anybody wants them.

    It knows nothing of the runtime: whatever it reads it hands to ``answer``, one request at a time and in order, and
    that is all the back-pressure there is: it reads no more while ``answer`` works or while its reader is full.
    """

    def serve(self, answer: Answerer, stop: threading.Event) -> None:
        """Returns when there will be no more rows, or soon after ``stop`` is set, with everything closed.

        Raises:
            OSError: what it reads from or writes to is broken for good.
        """
