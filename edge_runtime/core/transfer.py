"""Fetching a blob chunk by chunk: which chunks to ask for, which bytes to keep, when to give up.

Chunks are handed out in order, so the staging file is always a prefix of the blob and its length alone says where to
resume. MQTT answers for what does not exist with silence: a chunk that stays away is asked for again, then
given up on. Nobody's bytes are believed here; the digest of the whole blob is checked by whoever collects them.
"""

from dataclasses import dataclass
from typing import Final

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.topics import CHUNK_BYTES, MAX_BLOB_BYTES, chunk_count

IN_FLIGHT: Final = 4
PATIENCE_SECONDS: Final = 5.0
ATTEMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class Ask:
    """Subscribe to this chunk; ``again`` when it was asked for before and did not come."""

    index: int
    again: bool = False


@dataclass(frozen=True, slots=True)
class Leave:
    """The chunk is here: unsubscribe from it."""

    index: int


@dataclass(frozen=True, slots=True)
class Append:
    """The next bytes of the blob, to be added to the staging file."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """Every byte was handed out."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Nothing more will be asked for. What was handed out stays good to resume from."""

    reason: str


Action = Ask | Leave | Append | Done | Failed


@dataclass(slots=True)
class _Wait:
    until_seconds: float
    asked: int


class Transfer:
    """One blob on its way. Times are monotonic seconds; after `Done` or `Failed` nothing more happens.

    ``have`` is how many leading chunks of ``chunk_bytes`` the staging file holds already. At most ``in_flight`` chunks
    are awaited or held for their turn, so memory is bounded by ``in_flight * chunk_bytes``.
    """

    def __init__(
        self,
        *,
        length: int,
        have: int = 0,
        chunk_bytes: int = CHUNK_BYTES,
        deadline_seconds: float,
        in_flight: int = IN_FLIGHT,
        patience_seconds: float = PATIENCE_SECONDS,
        attempts: int = ATTEMPTS,
    ) -> None:
        if not 1 <= length <= MAX_BLOB_BYTES:
            raise ContractError(
                f"a blob of {length} bytes cannot be fetched over MQTT; 1 to {MAX_BLOB_BYTES} are allowed"
            )
        self._length = length
        self._chunk_bytes = chunk_bytes
        self._chunks = chunk_count(length, chunk_bytes)
        self._next = have  # the next chunk to hand out
        self._asked = have  # the next chunk nobody asked for yet
        self._deadline = deadline_seconds
        self._in_flight = in_flight
        self._patience = patience_seconds
        self._attempts = attempts
        self._awaited: dict[int, _Wait] = {}
        self._held: dict[int, bytes] = {}
        self._over = False

    @property
    def over(self) -> bool:
        """Whether `Done` or `Failed` was returned."""
        return self._over

    def start(self, now: float) -> list[Action]:
        """The first chunks to ask for."""
        return self._advance(now)

    def chunk(self, index: int, payload: bytes, now: float) -> list[Action]:
        """A chunk came in. One that nobody waits for (a duplicate) is ignored, and so is the empty payload with
        which a broker announces that a retained chunk was removed.
        """
        if self._over or index not in self._awaited or not payload:
            return []
        wanted = min(self._chunk_bytes, self._length - index * self._chunk_bytes)
        if len(payload) != wanted:
            return self._fail(
                f"chunk {index} of {self._chunks} holds {len(payload)} bytes instead of {wanted}: it was not "
                "published by this fleet's publisher, publish the model again"
            )
        del self._awaited[index]
        self._held[index] = payload
        return [Leave(index), *self._advance(now)]

    def tick(self, now: float) -> list[Action]:
        """Time has passed: ask again for what stayed away, or give up."""
        if self._over:
            return []
        if now >= self._deadline:
            return self._fail(
                f"the deadline passed after {self._next} of {self._chunks} chunks; the next try resumes there"
            )
        actions: list[Action] = []
        for index, wait in self._awaited.items():
            if now < wait.until_seconds:
                continue
            if wait.asked >= self._attempts:
                return self._fail(
                    f"chunk {index} of {self._chunks} did not arrive in {wait.asked} tries of {self._patience:g} s: "
                    "publish the model's chunks again"
                )
            wait.asked += 1
            wait.until_seconds = now + self._patience
            actions.append(Ask(index, again=True))
        return actions

    def due_seconds(self) -> float:
        """When `tick` has something to do at the latest."""
        return min([self._deadline, *(wait.until_seconds for wait in self._awaited.values())])

    def _advance(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while self._next in self._held:
            actions.append(Append(self._held.pop(self._next)))
            self._next += 1
        while self._asked < self._chunks and self._asked - self._next < self._in_flight:
            self._awaited[self._asked] = _Wait(now + self._patience, asked=1)
            actions.append(Ask(self._asked))
            self._asked += 1
        if self._next >= self._chunks:
            self._over = True
            actions.append(Done())
        return actions

    def _fail(self, reason: str) -> list[Action]:
        self._over = True
        return [*(Leave(index) for index in self._awaited), Failed(reason)]
