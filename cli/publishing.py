"""From a repository on disk to the broker: the chunks of models and the trust metadata, retained."""

import random
import time
from collections.abc import Callable, Iterable
from typing import Final

from edge_runtime.contract.errors import LinkError
from edge_runtime.contract.ids import Digest, FleetId
from edge_runtime.contract.topics import Topics
from edge_runtime.core.backoff import next_delay_seconds
from edge_runtime.link import Connected, Delivered, Disconnected, Link, Outgoing
from edge_runtime.mqtt.broker import Broker
from trainer.publish import Repository

IN_FLIGHT: Final = 16
_POLL_SECONDS: Final = 0.5


def publish(
    repository: Repository,
    digests: Iterable[Digest],
    *,
    fleet: FleetId,
    broker: Broker,
    timeout_seconds: float = 60.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> int:
    """Sends the chunks of ``digests`` and the current metadata, and returns the bytes sent.

    Returns when the broker has confirmed every message. Raises `LinkError` when it has not within
    ``timeout_seconds``, `PublishError` when a digest is not in the repository.
    """
    waiting = [Outgoing(*item) for item in repository.outgoing(Topics(fleet), digests)][::-1]
    total, size = len(waiting), sum(len(item.payload) for item in waiting)
    rng = random.Random()  # noqa: S311 (jitter, no secret)
    link = Link(
        broker,
        client_id=f"publisher-{rng.getrandbits(32):08x}",
        delay=lambda attempt: next_delay_seconds(attempt, rng),
    )
    flying: dict[int, Outgoing] = {}
    deadline = time.monotonic() + timeout_seconds
    link.start()
    try:
        while waiting or flying:
            if time.monotonic() > deadline:
                raise LinkError(
                    f"broker {broker.host}:{broker.port} confirmed {total - len(waiting) - len(flying)} of {total} "
                    f"messages in {timeout_seconds:.0f} s; publish again, nothing is half done"
                )
            match link.poll(_POLL_SECONDS):
                case Disconnected():
                    waiting += flying.values()
                    flying.clear()
                case Delivered(token, refusal):
                    if refusal:
                        raise LinkError(f"the broker refused {flying.pop(token).topic}: {refusal}")
                    flying.pop(token, None)
                case Connected() | None | _:
                    pass
            while link.connected and waiting and len(flying) < IN_FLIGHT:
                flying[link.publish(waiting[-1])] = waiting[-1]
                waiting.pop()
            if progress is not None:
                progress("sent", total - len(waiting) - len(flying), total)
    finally:
        link.stop(timeout=2.0)
    return size
