"""Values that tests of the device's control plane are made of."""

from pathlib import Path

import numpy as np

from edge_runtime.adapters.slots import Slots
from edge_runtime.contract.codec import encode
from edge_runtime.contract.ids import CohortId, DeviceId, Digest, FleetId, ModelName, RolloutId, SessionId
from edge_runtime.contract.latency import LatencyHistogram, observe_ns
from edge_runtime.contract.messages import Health, SignedRelease
from edge_runtime.contract.profile import CellSpec, FeatureCells, Profile, empty_profile
from edge_runtime.contract.release import EVERYONE, Release, ShadowGate, TrialGate, to_payload
from edge_runtime.core.events import WindowClosed
from edge_runtime.core.lifecycle import SlotState, from_document
from edge_runtime.core.voice import Identity

FLEET = FleetId("fleet")
DEVICE = DeviceId("dev-1")
COHORT = CohortId("main")
MODEL = ModelName("watch")
SESSION = SessionId("00000000000000aa")
GATE = TrialGate(predictions=200, seconds=5.0, starts=3)
SPEC = CellSpec((FeatureCells("x", (0.0, 1.0)),), FeatureCells("score", (0.5,)), 2)


def digest(name: str) -> Digest:
    """A digest that can be told apart in a failure: the name's bytes, padded with zeros."""
    return Digest(name.encode().hex().ljust(64, "0")[:64])


A, B, C, P = (digest(name) for name in "ABCP")


def identity(device: str = DEVICE, session: str = SESSION) -> Identity:
    return Identity(
        fleet=FLEET, device=DeviceId(device), cohort=COHORT, session=SessionId(session), model=MODEL
    )


def release(
    candidate: Digest | None = None,
    incumbent: Digest | None = None,
    *,
    revision: int = 1,
    threshold: int = EVERYONE,
    rollout: str = "r1",
    attempt: int = 1,
    trial: TrialGate = GATE,
    shadow: ShadowGate = ShadowGate(),  # noqa: B008 (frozen)
    cohort: str = COHORT,
    fleet: str = FLEET,
    model: str = MODEL,
) -> Release:
    return Release(
        fleet=FleetId(fleet),
        cohort=CohortId(cohort),
        model=ModelName(model),
        rollout=RolloutId(rollout),
        revision=revision,
        threshold=threshold,
        candidate=candidate,
        incumbent=incumbent,
        attempt=attempt,
        trial=trial,
        shadow=shadow,
    )


def signed(document: Release, signature: bytes = b"good") -> bytes:
    """The release as it comes over the wire; nothing in these tests checks a real signature."""
    return encode(SignedRelease(payload=to_payload(document), signatures=(("key", signature),)))


def cpu(samples: int, each_ns: int = 50_000) -> LatencyHistogram:
    return observe_ns(np.full(samples, each_ns, np.int64))


def profile(rows: int) -> Profile:
    """``rows`` equal rows."""
    counts = np.zeros(SPEC.size, np.int64)
    counts[[1, int(SPEC.offsets[1]), int(SPEC.offsets[2])]] = rows
    return Profile(
        layout=SPEC.layout, rows=rows, counts=counts, sums=empty_profile(SPEC, probabilities=False).sums
    )


def closed(model: Digest, rows: int = 20, each_ns: int = 50_000, end_ns: int = 2) -> WindowClosed:
    return WindowClosed(
        digest=model,
        start_ns=1,
        end_ns=end_ns,
        synced=True,
        profile=profile(rows),
        latency=cpu(rows, each_ns),
        health=Health(rss_bytes=1, peak_rss_bytes=2, cpu_ns=3, uptime_ns=4),
    )


def whole_state(folder: Path, model: ModelName) -> SlotState:
    """The state on disk; fails unless it is whole, and every model that it names installed and whole."""
    slots = Slots(folder)
    assert slots.damage == ()
    record = slots.record()
    assert record is not None
    state = from_document(record, model)
    for found in state.known:
        assert slots.has(found, verify=True), f"{found} of {state}"
    return state
