"""Runs an aggregator until SIGTERM: ``python -m tests.support.run_aggregator CONFIG.toml [POINT before|after N]``.

With a point, ``module:function``, the process kills itself at its N-th call: see `tests.support.doomed`.
"""

import logging
import signal
import sys
import threading

from aggregator.config import load
from aggregator.service import Service
from tests.support.doomed import doom

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    config, *point = sys.argv[1:]
    if point:
        target, when, nth = point
        doom(target, when, int(nth))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    Service(load(config)).run(stop)
