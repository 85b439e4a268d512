"""Runs an aggregator until SIGTERM: ``python -m tests.support.run_aggregator CONFIG.toml``."""

import logging
import signal
import sys
import threading

from aggregator.config import load
from aggregator.service import Service

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    Service(load(sys.argv[1])).run(stop)
