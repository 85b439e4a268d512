"""The world of the fleet simulator: virtual time, chance, what goes wrong, what models are like, and the broker."""

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from edge_runtime.contract import topics
from edge_runtime.contract.ids import DeviceId, Digest, SessionId
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.topics import Delivery
from tests.support.device import FLEET, cpu

TOPICS = topics.Topics(FLEET)
WALL_NS = 1_700_000_000_000_000_000
BEAT_SECONDS = 1.0
ROWS_PER_WINDOW = 20

Key = tuple[DeviceId, SessionId, int]
Call = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How bad the world is: chances from 0 to 1, ``breaks`` per device and second, ``power`` per action.

    ``disk`` per state to save.
    """

    late: float = 0.0
    repeat: float = 0.0
    lose: float = 0.0
    breaks: float = 0.0
    power: float = 0.0
    child: float = 0.0
    centre: float = 0.0
    disk: float = 0.0
    late_wills: bool = False


CALM = Faults()
ROUGH = Faults(late=0.1, repeat=0.2, lose=0.2, breaks=0.01, power=0.001, child=0.3, centre=0.05, disk=0.1)
HARSH = Faults(late=0.3, repeat=0.4, lose=0.5, breaks=0.05, power=0.02, child=0.5, centre=0.2, disk=0.4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a model is like on the devices."""

    probe_ok: bool = True
    cpu_ns: int = 50_000
    crashes: bool = False
    disagrees: float = 0.0
    refuses: float = 0.0
    dies_in_shadow: bool = False

    def cpu_times(self, calls: int) -> LatencyHistogram:
        """The histogram of ``calls`` equal calls."""
        if not calls:
            return LatencyHistogram()
        return replace(cpu(1, self.cpu_ns), counts=(calls,), sum_ns=calls * self.cpu_ns)


GOOD = Kind()
SLOW_IN_PROBE = Kind(probe_ok=False)
SLOW_ON_TRIAL = Kind(cpu_ns=10_000_000)
CRASHES = Kind(crashes=True)
DIES_IN_SHADOW = Kind(dies_in_shadow=True)
DISAGREES = Kind(disagrees=0.5)
REFUSES = Kind(refuses=0.5)


class World:
    """Everybody asks it for the time, for chance, and for something to happen later."""

    def __init__(self, seed: int, kinds: dict[Digest, Kind], faults: Faults) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.kinds = kinds
        self.faults = faults
        self.window_seconds = 20.0
        self._calls: list[tuple[float, int, Call]] = []
        self._numbers = 0

    @property
    def wall_ns(self) -> int:
        return WALL_NS + int(self.now * 1e9)

    def after(self, seconds: float, call: Call) -> None:
        self._numbers += 1
        heapq.heappush(self._calls, (self.now + seconds, self._numbers, call))

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Lets time pass; returns True as soon as ``until`` holds at the end of a beat."""
        end = self.now + seconds
        while self.now < end:
            beat = self.now + BEAT_SECONDS
            while self._calls and self._calls[0][0] <= beat:
                self.now, _, call = heapq.heappop(self._calls)
                call()
            self.now = beat
            if until():
                return True
        return False

    def chance(self, share: float) -> bool:
        return share > 0.0 and self.rng.random() < share

    def delay(self) -> float:
        late = self.rng.uniform(1.0, 5.0) if self.chance(self.faults.late) else 0.0
        return late + self.rng.expovariate(20.0)

    def law(self, holds: bool, name: str) -> None:
        assert holds, f"{name} (at {self.now:.2f} s)"


class Reader(Protocol):
    """A device as the broker sees it; ``link`` numbers its connections and is 0 while there is none."""

    link: int

    def receive(self, link: int, topic: str, payload: bytes) -> None: ...


class Broker:
    """Keeps retained messages and passes on the rest: to the devices that read a topic, else to the centre."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._readers: dict[str, list[Reader]] = {}
        self._status_at: dict[str, float] = {}
        self.retained: dict[str, bytes] = {}
        self.centre: Callable[[str, bytes], None]

    def register(self, reader: Reader, wanted: Iterable[str]) -> None:
        for topic in wanted:
            self._readers.setdefault(topic, []).append(reader)

    def attach(self, reader: Reader, wanted: Iterable[str]) -> None:
        """A device has subscribed: what is retained on its topics is on its way."""
        for topic in wanted:
            if topic in self.retained:
                payload = self.retained[topic]
                self._pass_on(partial(reader.receive, reader.link, topic, payload), topics.RELEASE)

    def publish(self, topic: str, payload: bytes, delivery: Delivery) -> None:
        if delivery.retain:
            self.retained[topic] = payload
        for reader in self._readers.get(topic, ()):
            self._pass_on(partial(reader.receive, reader.link, topic, payload), delivery)
        if topic not in self._readers:
            now, delay = self._world.now, self._world.delay()
            if delivery == topics.STATUS:
                delay = max(delay, self._status_at.get(topic, 0.0) - now)
                self._status_at[topic] = now + delay
            self._pass_on(partial(self.centre, topic, payload), delivery, delay)

    def _pass_on(self, deliver: Call, delivery: Delivery, delay: float | None = None) -> None:
        world = self._world
        if delivery.qos == 0 and world.chance(world.faults.lose):
            return
        delay = world.delay() if delay is None else delay
        world.after(delay, deliver)
        if delivery.qos and world.chance(world.faults.repeat):
            world.after(delay + world.delay(), deliver)
