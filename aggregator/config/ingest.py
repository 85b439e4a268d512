"""`[ingest]`: how telemetry is taken in."""

import re
from dataclasses import dataclass

from edge_runtime.contract.fields import Fields

_SHARE = re.compile(r"([a-z0-9-]{1,64})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestConfig:
    """How telemetry is taken in.

    ``batch_messages`` is the most that one transaction commits. ``device_messages`` is the most of one device that
    wait for a batch: what it sends beyond the broker may forget, but the device is not told that it is stored, and
    sends it again. Devices have 20 on the way at most. ``dead_letters`` bounds how many bad messages are kept.
    ``rebirth_seconds`` is the least time between two rebirth commands to one device. ``retention_days`` drops
    windows that were received longer ago; 0 keeps them for ever.

    Processes with the same ``share`` and
    ``state_dir`` share the windows and events between them; empty, there is one process. One of them leads: it
    renews a lease, and ``lease_seconds`` after its last renewal another takes over.
    """

    batch_messages: int = 1000
    device_messages: int = 64
    dead_letters: int = 1000
    rebirth_seconds: float = 30.0
    retention_days: float = 0.0
    share: str = ""
    lease_seconds: float = 15.0


def read_ingest(f: Fields) -> IngestConfig:
    """The section; raises the reader's error family."""
    default = IngestConfig()
    config = IngestConfig(
        batch_messages=f.integer("batch_messages", default.batch_messages, low=1, high=4096),
        device_messages=f.integer("device_messages", default.device_messages, low=20, high=4096),
        dead_letters=f.integer("dead_letters", default.dead_letters, low=1, high=1_000_000),
        rebirth_seconds=f.number("rebirth_seconds", default.rebirth_seconds, low=0.1),
        retention_days=f.number("retention_days", default.retention_days, low=0.0),
        share=f.text("share", default.share, pattern=_SHARE),
        lease_seconds=f.number("lease_seconds", default.lease_seconds, low=0.5, high=3600.0),
    )
    f.finish()
    return config
