"""From a repository on disk to the broker: the chunks of models and the trust metadata, retained."""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Final, Self

from edge_runtime.contract.errors import BudgetExceeded, LinkError
from edge_runtime.contract.ids import Digest, FleetId
from edge_runtime.contract.topics import BLOB, Topics
from edge_runtime.core.backoff import next_delay_seconds
from edge_runtime.link import Connected, Delivered, Disconnected, Link, Outgoing
from edge_runtime.mqtt.broker import Broker
from trainer.outgoing import Outgoing as Item
from trainer.publish import Repository

IN_FLIGHT: Final = 16
_POLL_SECONDS: Final = 0.5
Progress = Callable[[str, int, int], None]


def publish(
    repository: Repository,
    digests: Iterable[Digest],
    *,
    fleet: FleetId,
    broker: Broker,
    patience_seconds: float = 60.0,
    progress: Progress | None = None,
) -> int:
    """Sends the chunks of ``digests`` and the current metadata, and returns the bytes sent.

    However long it takes, it goes on while the broker confirms anything. Returns when it has confirmed every message.
    Raises `LinkError` when it confirmed none for ``patience_seconds``, `PublishError` when a digest is not published.

    Chunks go first, whoever else publishes: they are named by what they hold. The metadata is collected when they are
    there, and sent while no other publisher sends any: otherwise metadata that was collected earlier could arrive
    later, and take back a revocation. So a revocation never waits for somebody's large model, only for metadata.
    """
    names = Topics(fleet)
    wanted = tuple(digests)
    models = repository.wanted(wanted)
    tell = progress or (lambda *_: None)
    with _Sender(broker, patience_seconds, tell) as sender:
        sender.send(repository.chunks(names, models), sum(model.chunks for model in models))
        tell("waiting for another publisher", 0, 0)
        with repository.sending():
            rest = list(repository.outgoing(names, wanted, sent=models))
            sender.send(iter(rest), len(rest))
    return sender.size


class _Sender:
    """A connection that sends messages until the broker has confirmed each. A context manager that ends it."""

    def __init__(self, broker: Broker, patience_seconds: float, tell: Progress) -> None:
        rng = random.Random()  # noqa: S311 (jitter, no secret)
        self._broker = broker
        self._patience = patience_seconds
        self._tell = tell
        self._link = Link(
            broker,
            client_id=f"publisher-{rng.getrandbits(32):08x}",
            delay=lambda attempt: next_delay_seconds(attempt, rng),
        )
        self._flying: dict[int, Outgoing] = {}
        self._again: list[Outgoing] = []
        self._reason = "no answer"
        self._reached = False
        self._due = 0.0
        self.size = 0
        """Bytes that the broker has confirmed."""

    def __enter__(self) -> Self:
        self._link.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.stop(timeout=2.0)

    def send(self, items: Iterator[Item], total: int) -> None:
        """Returns when all ``total`` are confirmed. Raises `LinkError`, and what ``items`` raise."""
        done = 0
        self._due = time.monotonic() + self._patience
        while done < total:
            self._fill(items)
            match self._link.poll(_POLL_SECONDS):
                case Connected():
                    self._reached = True
                case Disconnected(reason):
                    self._reason = reason
                    self._again += self._flying.values()
                    self._flying.clear()
                case Delivered(token, refusal) if token in self._flying:
                    item = self._flying.pop(token)
                    if refusal:
                        raise LinkError(f"the broker refused {item.topic}: {refusal}")
                    self.size += len(item.payload)
                    done += 1
                    self._due = time.monotonic() + self._patience
                    self._tell("sent", done, total)
            if time.monotonic() > self._due:
                raise LinkError(self._silence(done, total))

    def _silence(self, done: int, total: int) -> str:
        """What to say of a broker that confirms nothing any more."""
        place = f"broker {self._broker.host}:{self._broker.port}"
        if not self._reached:
            return (
                f"{place} could not be reached for {self._patience:.0f} s ({self._reason}): see that it runs, and "
                "[broker] in the aggregator's file; then publish again, nothing is half done"
            )
        return (
            f"{place} confirmed {done} of {total} messages and then none for {self._patience:.0f} s "
            f"({self._reason}); publish again, nothing is half done. Where it takes no messages of this size, "
            "publish the model in smaller chunks: --chunk-kib"
        )

    def _fill(self, items: Iterator[Item]) -> None:
        """Hands messages over while there is room, those first that an earlier connection took with it."""
        while self._link.connected and len(self._flying) < IN_FLIGHT:
            item = self._again.pop() if self._again else next((Outgoing(*i) for i in items), None)
            if item is None:
                return
            try:
                token = self._link.publish(item)
            except BudgetExceeded as e:
                smaller = "publish the model in smaller chunks: --chunk-kib"
                remedy = smaller if item.delivery is BLOB else "retire models: skiff pki retire"
                raise LinkError(f"{e}, or {remedy}") from e
            except LinkError as e:  # lost since it was looked at: the next connection takes it
                self._reason = str(e)
                self._again.append(item)
                return
            self._flying[token] = item
