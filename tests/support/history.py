"""Windows as a device would close them one after another, and what a pile of them adds up to."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

import numpy as np

from edge_runtime.contract import ids, topics
from edge_runtime.contract.codec import decode
from edge_runtime.contract.ids import SessionId
from edge_runtime.contract.latency import LatencyHistogram, observe_ns
from edge_runtime.contract.messages import Event, Health, Window
from edge_runtime.contract.profile import Binner, CellSpec, cells_from_training

DEVICE: Final = ids.device_id("pump-0042")
MODEL: Final = ids.model_name("pump")
DIGEST: Final = ids.digest("ab" * 32)
TOPIC: Final = topics.Topics(ids.fleet_id("plant")).window(DEVICE, MODEL)
EVENT_TOPIC: Final = topics.Topics(ids.fleet_id("plant")).event(DEVICE)
PERIOD_NS: Final = 300 * 10**9
BEGIN_NS: Final = 1_780_000_200 * 10**9  # a multiple of the period


def session(number: int) -> SessionId:
    """The session of the device's ``number``-th start."""
    return ids.session_id(f"{number:016x}")


class History:
    """Makes windows of ``rows`` rows of ``features`` features and two classes, ``kinds`` kinds in turn."""

    def __init__(self, *, features: int = 3, rows: int = 40, kinds: int = 5, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.spec = CellSpec(
            tuple(cells_from_training(f"x{j}", rng.normal(size=2000)) for j in range(features)),
            cells_from_training("score", rng.uniform(0.5, 1.0, 2000)),
            2,
        )
        self._kinds = [self._kind(rng, rows, n) for n in range(kinds)]
        self._closed = 0

    def _kind(self, rng: np.random.Generator, rows: int, number: int) -> Window:
        binner = Binner(self.spec, probabilities=True)
        p = rng.uniform(size=rows).astype(np.float32)
        scores = np.stack([1 - p, p], axis=1)
        values = rng.normal(size=(rows, len(self.spec.features))).astype(np.float32)
        binner.observe(values, scores.argmax(axis=1).astype(np.int64), scores)
        return Window(
            device=DEVICE,
            session=session(1),
            seq=0,
            seq_lo=0,
            model=MODEL,
            digest=DIGEST,
            start_ns=0,
            end_ns=0,
            synced=True,
            profile=binner.take(),
            latency=observe_ns(rng.lognormal(11.0, 0.4, rows).astype(np.int64)),
            queueing=observe_ns(rng.lognormal(8.0, 0.6, rows).astype(np.int64)),
            health=Health(
                rss_bytes=60 << 20, peak_rss_bytes=(70 + number) << 20, cpu_ns=10**9, uptime_ns=10**12
            ),
            refused=(*((("shed", 2),) if number % 2 else ()), ("width", number)),
            failed=number % 3,
            labelled=10,
            correct=number % 10,
        )

    def window(self, start: int, seq: int, **changes: Any) -> Window:
        """The next window, closed as number ``seq`` of the ``start``-th session, a period after the one before."""
        self._closed += 1
        begin_ns = BEGIN_NS + self._closed * PERIOD_NS
        made = replace(
            self._kinds[self._closed % len(self._kinds)],
            session=session(start),
            seq=seq,
            seq_lo=seq,
            start_ns=begin_ns,
            end_ns=begin_ns + PERIOD_NS,
        )
        return replace(made, **changes)


def event(start: int, seq: int, name: str = "started") -> Event:
    """An event of the device."""
    wall_ns = BEGIN_NS + seq * PERIOD_NS
    return Event(
        device=DEVICE, session=session(start), seq=seq, wall_ns=wall_ns, name=name, detail=(("a", "b"),)
    )


def total(windows: Iterable[Window]) -> tuple[object, ...]:
    """Everything windows count, added up one by one."""
    rows = windows_held = failed = labelled = correct = peak = 0
    cells: list[int] = []
    sums: list[int] = []
    latency, queueing = LatencyHistogram(), LatencyHistogram()
    refused: Counter[str] = Counter()
    for w in windows:
        cells = (
            [a + b for a, b in zip(cells, w.profile.counts.tolist(), strict=True)]
            if cells
            else w.profile.counts.tolist()
        )
        sums = (
            [a + b for a, b in zip(sums, w.profile.sums.tolist(), strict=True)]
            if sums
            else w.profile.sums.tolist()
        )
        rows += w.profile.rows
        windows_held += w.windows
        failed += w.failed
        labelled += w.labelled
        correct += w.correct
        peak = max(peak, w.health.peak_rss_bytes)
        latency, queueing = latency.merge(w.latency), queueing.merge(w.queueing)
        refused.update(dict(w.refused))
    counted = tuple(sorted(refused.items()))
    return (rows, windows_held, cells, sums, latency, queueing, counted, failed, labelled, correct, peak)


def read_windows(payloads: Iterable[bytes]) -> list[Window]:
    """The windows among the payloads."""
    return [message for message in map(decode, payloads) if isinstance(message, Window)]
