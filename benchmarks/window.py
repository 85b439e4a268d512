"""The message of one window: how many bytes, and what it costs to count its rows and to encode it.

1,000 rows of 30 numeric features, each normal and cut into the cells of its training rows: every cell is in use, so
smaller messages than these are the rule. ``shifted`` rows have moved by two standard deviations and crowd the outer
cells. Latency and queueing are log-normal with a slow tail; every reading of health is there.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import codec, ids
from edge_runtime.contract.latency import LatencyHistogram, observe_ns
from edge_runtime.contract.messages import Health, Window
from edge_runtime.contract.profile import Binner, CellSpec, Profile, cells_from_training
from edge_runtime.serving import RING_ROWS

ROWS: Final = 1_000
FEATURES: Final = 30
TRAINING_ROWS: Final = 20_000
TARGET_BYTES: Final = 700
TARGET_BINNING_US: Final = 2.0

_HEALTH: Final[dict[str, int]] = {
    "rss_bytes": 71_303_168,
    "peak_rss_bytes": 74_448_896,
    "cpu_ns": 3_600_123_456_789,
    "uptime_ns": 2_592_000_123_456_789,
    "pss_bytes": 66_060_288,
    "memory_limit_bytes": 268_435_456,
    "memory_pressure_ppm": 12_500,
    "minor_faults": 48_211,
    "major_faults": 37,
    "temperature_mc": 61_250,
    "throttled": 2,
}
"""A Raspberry Pi after a month."""

_Batch = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]


def _rows(rng: np.random.Generator, rows: int, classes: int, shift: float) -> _Batch:
    """Features (n, 30), labels (n,) of the highest probability, and probabilities (n, C)."""
    features = (rng.normal(size=(rows, FEATURES)) + shift).astype(np.float32)
    logits = 2.0 * rng.normal(size=(rows, classes)) + 0.5 * shift * (np.arange(classes) == 0)
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    return features, scores.argmax(axis=1), scores.astype(np.float32)


def _spec(rng: np.random.Generator, classes: int) -> CellSpec:
    features, _, scores = _rows(rng, TRAINING_ROWS, classes, 0.0)
    columns = [cells_from_training(f"feature_{j}", features[:, j]) for j in range(FEATURES)]
    return CellSpec(tuple(columns), cells_from_training("score", scores.max(axis=1)), classes)


def _bin(spec: CellSpec, batch: _Batch) -> Profile:
    binner = Binner(spec, probabilities=True)
    features, labels, scores = batch
    for start in range(0, len(features), RING_ROWS):
        part = slice(start, start + RING_ROWS)
        binner.observe(features[part], labels[part], scores[part])
    return binner.take()


def _durations(rng: np.random.Generator, rows: int, median_ns: float) -> LatencyHistogram:
    """Log-normal, and one in a hundred ten times as long: a scheduler's doing."""
    found = median_ns * np.exp(0.25 * rng.normal(size=rows)) * np.where(rng.random(rows) < 0.01, 10.0, 1.0)
    return observe_ns(found.astype(np.int64))


def _window(rng: np.random.Generator, profile: Profile) -> Window:
    latency = _durations(rng, profile.rows, 20_000.0)
    health = {field.name: _HEALTH[field.name] for field in fields(Health)}
    more: dict[str, Any] = {}
    if "queueing" in {field.name for field in fields(Window)}:
        more["queueing"] = _durations(rng, profile.rows, 60_000.0)
    start_ns = 1_790_000_000_000_000_000
    return Window(
        device=ids.device_id("gateway-0042"),
        session=ids.session_id("0123456789abcdef"),
        seq=8_640,
        seq_lo=8_640,
        model=ids.model_name("watch"),
        digest=ids.digest_of(b"benchmark"),
        start_ns=start_ns,
        end_ns=start_ns + 300_000_000_000,
        synced=True,
        profile=profile,
        latency=latency,
        health=Health(**health),
        refused=(("missing", 3), ("range", 1)),
        labelled=100,
        correct=93,
        **more,
    )


def _best_us(call: Callable[[], object], rounds: int) -> float:
    """The quickest of ``rounds``, in microseconds: what it costs where nobody disturbs."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter_ns()
        call()
        best = min(best, (time.perf_counter_ns() - start) / 1e3)
    return best


def run(*, classes: Sequence[int] = (2, 7, 50), rows: int = ROWS, rounds: int = 50) -> list[dict[str, Any]]:
    """One row of figures per number of classes, and one for two classes with shifted rows."""
    found = []
    for count, shift in (*((c, 0.0) for c in classes), (classes[0], 2.0)):
        rng = np.random.default_rng(count)
        spec = _spec(rng, count)
        batch = _rows(rng, rows, count, shift)
        window = _window(rng, _bin(spec, batch))
        payload = codec.encode(window)
        if codec.decode(payload) != window:
            raise AssertionError("the window is not what it was when it comes back")
        found.append(
            {
                "rows": rows,
                "features": FEATURES,
                "classes": count,
                "shifted": "yes" if shift else "no",
                "counters": int(window.profile.counts.size),
                "bytes": len(payload),
                "bin us/row": round(_best_us(lambda s=spec, b=batch: _bin(s, b), rounds) / rows, 2),  # type: ignore[misc]
                "encode us": round(_best_us(lambda w=window: codec.encode(w), rounds), 1),  # type: ignore[misc]
                "decode us": round(_best_us(lambda p=payload: codec.decode(p), rounds), 1),  # type: ignore[misc]
            }
        )
    return found


def main() -> int:
    """Prints the table, and the targets."""
    figures = run()
    for row in figures:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(f"at most {TARGET_BYTES} bytes for 2 classes, {TARGET_BINNING_US} us a row for binning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
