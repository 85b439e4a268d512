"""The values behind the golden bytes of contract major 1. Never change one: add another beside it.

`MINOR_0` were the messages when minor 0 was written, `MESSAGES` are those of today.
"""

from dataclasses import replace
from typing import Final

import numpy as np

from edge_runtime.contract import ids, messages
from edge_runtime.contract.latency import observe_ns
from edge_runtime.contract.messages import Message
from edge_runtime.contract.profile import Binner, CellSpec, FeatureCells, Profile
from edge_runtime.contract.release import Release, ShadowGate, TrialGate

DEVICE: Final = ids.device_id("watch-07-left")
SESSION: Final = ids.session_id("0123456789abcdef")
MODEL: Final = ids.model_name("watch")
FIRST: Final = ids.digest("aa" * 32)
SECOND: Final = ids.digest("bb" * 32)
THIRD: Final = ids.digest("0c" * 32)

SPEC: Final = CellSpec(
    features=(FeatureCells("accel_x_mean", (-1.5, 0.0, 1.5)), FeatureCells("température", (20.0, 21.5))),
    score=FeatureCells("score", (0.5, 0.75)),
    classes=3,
)
REGRESSOR_SPEC: Final = CellSpec((FeatureCells("x", (0.0,)),), FeatureCells("score", (-1.0, 1.0)), 0)


def _profile() -> Profile:
    binner = Binner(SPEC, probabilities=True)
    rows = np.array([[-2.0, 20.0], [0.0, np.nan], [0.0, 30.0], [np.inf, 21.0]] * 100, np.float32)
    scores = np.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]] * 100)
    binner.observe(rows, scores.argmax(axis=1).astype(np.int64), scores.astype(np.float32))
    return binner.take()


def _regressor_profile() -> Profile:
    binner = Binner(REGRESSOR_SPEC, probabilities=False)
    rows = np.array([[-1.0], [1.0], [1.0]], np.float32)
    binner.observe(rows, np.zeros(3, np.int64), np.array([[0.0], [2.0], [-5.0]], np.float32))
    return binner.take()


WINDOW: Final = messages.Window(
    device=DEVICE,
    session=SESSION,
    seq=41,
    seq_lo=39,
    model=MODEL,
    digest=FIRST,
    start_ns=1_760_000_000_000_000_000,
    end_ns=1_760_000_300_000_000_000,
    synced=True,
    profile=_profile(),
    latency=observe_ns(np.array([0, 1, 900, 3100, 3150, 3200, 1_000_000], np.int64)),
    health=messages.Health(
        rss_bytes=61_000_000, peak_rss_bytes=80_000_000, cpu_ns=12_000_000_000, uptime_ns=86_400_000_000_000
    ),
    refused=(("missing", 3), ("width", 1)),
    failed=2,
    labelled=10,
    correct=9,
)

MINOR_0: Final[dict[str, Message]] = {
    "status-birth": messages.Status(
        device=DEVICE,
        session=SESSION,
        seq=1,
        online=True,
        attributes=(("person", "07"), ("wrist", "left")),
        models=(
            messages.ModelReport(
                model=MODEL,
                state="trial",
                serving=SECOND,
                previous=FIRST,
                candidate=SECOND,
                rollout="r-2",
                revision=12,
                outcome="rolled_back",
                outcome_digest=THIRD,
                reason="predict p99 of 9.1 ms is beyond the budget of 5.0 ms",
                quarantined=(THIRD,),
            ),
        ),
    ),
    "status-death": messages.Status(device=DEVICE, session=SESSION, seq=0, online=False),
    "window-classifier": WINDOW,
    "window-regressor": messages.Window(
        device=DEVICE,
        session=SESSION,
        seq=42,
        seq_lo=42,
        model=MODEL,
        digest=SECOND,
        start_ns=0,
        end_ns=1,
        synced=False,
        profile=_regressor_profile(),
        latency=observe_ns(np.zeros(0, np.int64)),
        health=messages.Health(),
    ),
    "event": messages.Event(
        device=DEVICE,
        session=SESSION,
        seq=43,
        wall_ns=1_760_000_300_000_000_001,
        name="rolled_back",
        detail=(("digest", THIRD), ("reason", "golden row 3 disagrees")),
    ),
    "ack": messages.Ack(device=DEVICE, session=SESSION, seqs=(39, 40, 41, 2**40)),
    "command": messages.Command(device=DEVICE, name="rebirth", correlation="c-1"),
    "trust-bundle": messages.TrustBundle(
        root_version=1, files=(("1.root.json", b'{"signed":{}}'), ("timestamp.json", b"{}"))
    ),
    "signed-release": messages.SignedRelease(
        payload=b'{"schema":1}', signatures=(("5e" * 32, bytes(range(64))),)
    ),
}


def _long_profile() -> Profile:
    """Columns alike, with many rows: counters in step."""
    spec = CellSpec(
        tuple(FeatureCells(f"f{j}", tuple(float(edge) for edge in range(12))) for j in range(20)),
        FeatureCells("score", (0.5, 0.75)),
        2,
    )
    i = np.arange(600)[:, None]
    rows = ((i * i + 7 * i * np.arange(20) + np.arange(20)) % 131 / 10 - 1).astype(np.float32)
    top = (0.5 + (i[:, 0] % 64) / 128).astype(np.float32)
    binner = Binner(spec, probabilities=True)
    binner.observe(rows, np.zeros(600, np.int64), np.stack([top, 1 - top], axis=1))
    return binner.take()


MERGED: Final = messages.Window(
    device=DEVICE,
    session=SESSION,
    seq=700,
    seq_lo=650,
    model=MODEL,
    digest=FIRST,
    start_ns=1_760_000_000_000_000_000,
    end_ns=1_759_999_000_000_000_000,  # the clock was set back
    synced=False,
    profile=_long_profile(),
    latency=observe_ns(np.arange(1, 601, dtype=np.int64) * 100),
    queueing=observe_ns(np.arange(0, 600, dtype=np.int64) * 7),
    health=messages.Health(
        rss_bytes=61_000_000,
        peak_rss_bytes=80_000_000,
        cpu_ns=12_000_000_000,
        uptime_ns=86_400_000_000_000,
        pss_bytes=55_000_000,
        memory_limit_bytes=2**27,
        memory_pressure_ppm=1200,
        minor_faults=123_456,
        major_faults=321,
        temperature_mc=61_300,
        throttled=2,
    ),
    refused=(("shed", 12),),
    failed=1,
    labelled=20,
    correct=18,
    windows=17,
)

MINOR_1: Final[dict[str, Message]] = {
    **MINOR_0,
    "status-restarted": messages.Status(
        device=DEVICE, session=SESSION, seq=2, online=True, last_exit="killed", restarts=3, clock="unsynced"
    ),
    "window-merged": MERGED,
}

LABELS: Final = messages.Labels(
    device=DEVICE,
    session=SESSION,
    seq=2**40,
    source=ids.source_id("laboratory-2"),
    model=MODEL,
    digest=FIRST,
    start_ns=1_760_000_000_000_000_000,
    end_ns=1_760_003_600_000_000_000,
    labelled=120,
    correct=97,
)

MINOR_2: Final[dict[str, Message]] = {
    **MINOR_1,
    "labels": LABELS,
}

MESSAGES: Final[dict[str, Message]] = {
    **MINOR_2,
    "status-shadow": messages.Status(
        device=DEVICE,
        session=SESSION,
        seq=3,
        online=True,
        models=(
            messages.ModelReport(model=MODEL, state="shadow", serving=FIRST, candidate=SECOND, revision=13),
            messages.ModelReport(
                model=ids.model_name("other"),
                state="committed",
                serving=THIRD,
                outcome="committed",
                outcome_digest=THIRD,
                shadow_rows=120,
                shadow_disagreed=7,
            ),
        ),
    ),
}

RELEASE: Final = Release(
    fleet=ids.fleet_id("demo"),
    cohort=ids.cohort_id("main"),
    model=MODEL,
    rollout=ids.rollout_id("r-2"),
    revision=12,
    threshold=2**63 + 1,
    candidate=SECOND,
    incumbent=FIRST,
    attempt=2,
    trial=TrialGate(predictions=500, seconds=2.5, starts=4),
)
STRICT: Final = replace(
    RELEASE, revision=14, trial=TrialGate(predictions=500, seconds=2.5, max_refused=0.125)
)
SHADOWED: Final = replace(RELEASE, revision=13, shadow=ShadowGate(rows=200, max_disagreement=0.25))
