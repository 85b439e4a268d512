"""One JSON object a line on stderr: the device's log."""

import json
import logging
import sys
import time


class JsonLines(logging.Formatter):
    """The message's first word is the event, the rest its detail; the device is bound."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON text."""
        event, _, rest = record.getMessage().partition(" ")
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "device": self._device,
            "event": event,
        }
        if rest:
            line["detail"] = rest
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(device: str) -> None:
    """Every record of at least INFO, of whatever library."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(device))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
