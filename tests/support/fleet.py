"""Values that tests of the aggregator are made of: devices that count rows, their messages, published artifacts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aggregator.records import DeviceRecord
from edge_runtime.contract import ids
from edge_runtime.contract.codec import encode
from edge_runtime.contract.ids import DeviceId, Digest, FleetId, ModelName, SessionId
from edge_runtime.contract.latency import observe_ns
from edge_runtime.contract.manifest import ArtifactInfo, Reference, to_metadata
from edge_runtime.contract.messages import Event, Health, Labels, ModelReport, Status, Window
from edge_runtime.contract.profile import Binner, CellSpec, Profile, cells_from_training, empty_profile
from edge_runtime.contract.topics import Topics
from tests.support.tiny_models import Tiny, classifier, sealed

FLEET = FleetId("fleet")
TOPICS = Topics(FLEET)
MODEL = ModelName("tiny")
SESSION = SessionId("00000000000000aa")
OTHER_SESSION = SessionId("00000000000000bb")
NAMES = ("a", "b", "c")
CLASSES = 3
SECOND = 1_000_000_000
DAY = 86_400 * SECOND
NOW = 1_700_000_000 * SECOND


def digest(name: str) -> Digest:
    """A digest that can be told apart in a failure: the name's bytes, padded with zeros."""
    return Digest(name.encode().hex().ljust(64, "0")[:64])


A, B, C = (digest(name) for name in "ABC")


def make_spec(seed: int = 0, features: int = len(NAMES)) -> CellSpec:
    """Cells of standard normal features, and of a score in (0, 1)."""
    rng = np.random.default_rng(seed)
    names = NAMES if features == len(NAMES) else tuple(f"f{j}" for j in range(features))
    columns = [cells_from_training(name, rng.normal(size=5000).astype(np.float32)) for name in names]
    return CellSpec(
        tuple(columns),
        cells_from_training("score", rng.uniform(1 / CLASSES, 1, 5000).astype(np.float32)),
        CLASSES,
    )


SPEC = make_spec()


def artifact_info(spec: CellSpec = SPEC, groups: tuple[tuple[str, Profile], ...] = ()) -> ArtifactInfo:
    """What an artifact with this layout would say about itself; there is no graph behind it."""
    tiny = classifier(NAMES, ("low", "mid", "high"), name=MODEL)
    manifest = replace(tiny.manifest, layout=spec.layout)
    total = empty_profile(spec, probabilities=True)
    for _, profile in groups:
        total = total.merge(profile)
    return ArtifactInfo(
        manifest=manifest,
        reference=Reference(spec=spec, total=total, groups=groups),
        golden=tiny.golden,
        certificate={},
        opset=manifest.opset,
        ir_version=manifest.ir_version,
    )


def count(spec: CellSpec, rows: NDArray[np.floating], scores: NDArray[np.floating] | None = None) -> Profile:
    """The profile of ``rows`` (n, F); without ``scores`` (n, C) the model is indifferent and mostly says class 0."""
    n = len(rows)
    if scores is None:
        scores = np.full((n, CLASSES), 1.0 / CLASSES)
        scores[:, 0] += 0.1
    binner = Binner(spec, probabilities=True)
    scores = scores.astype(np.float32)
    binner.observe(rows.astype(np.float32), scores.argmax(axis=1).astype(np.int64), scores)
    return binner.take()


def window(
    device: str = "dev-1",
    seq: int = 1,
    *,
    seq_lo: int | None = None,
    session: SessionId = SESSION,
    model: Digest = A,
    profile: Profile | None = None,
    rows: int = 20,
    seed: int | None = None,
    latency_ns: int = 50_000,
    failed: int = 0,
    refused: tuple[tuple[str, int], ...] = (),
    labelled: int = 0,
    correct: int = 0,
    start_ns: int = NOW,
    seconds: float = 10.0,
    windows: int = 1,
) -> Window:
    """A window of ``rows`` normal rows, different for every (device, seq) unless ``seed`` is given."""
    if profile is None:
        rng = np.random.default_rng([*device.encode(), seq] if seed is None else seed)
        profile = count(SPEC, rng.normal(size=(rows, len(NAMES))))
    return Window(
        device=DeviceId(device),
        session=session,
        seq=seq,
        seq_lo=seq if seq_lo is None else seq_lo,
        model=MODEL,
        digest=model,
        start_ns=start_ns,
        end_ns=start_ns + int(seconds * SECOND),
        synced=True,
        profile=profile,
        latency=observe_ns(np.full(min(profile.rows, rows), latency_ns, np.int64)),
        health=Health(rss_bytes=1000 + seq, peak_rss_bytes=2000 + seq, cpu_ns=3, uptime_ns=4),
        refused=refused,
        failed=failed,
        labelled=labelled,
        correct=correct,
        windows=windows,
    )


def wire(message: Window | Status | Event | Labels) -> tuple[str, bytes]:
    """The message's topic and bytes."""
    match message:
        case Window():
            return TOPICS.window(message.device, message.model), encode(message)
        case Status():
            return TOPICS.status(message.device), encode(message)
        case Labels():
            return TOPICS.labels(message.source), encode(message)
    return TOPICS.event(message.device), encode(message)


def labels(
    device: str = "dev-1",
    seq: int = 1,
    *,
    source: str = "lab",
    session: SessionId = SESSION,
    model: Digest = A,
    labelled: int = 10,
    correct: int = 8,
    start_ns: int = NOW,
    seconds: float = 10.0,
) -> Labels:
    """Labels of the time that a `window` takes."""
    return Labels(
        device=DeviceId(device),
        session=session,
        seq=seq,
        source=ids.source_id(source),
        model=MODEL,
        digest=model,
        start_ns=start_ns,
        end_ns=start_ns + int(seconds * SECOND),
        labelled=labelled,
        correct=correct,
    )


def event(device: str = "dev-1", seq: int = 1, name: str = "started") -> Event:
    return Event(
        device=DeviceId(device), session=SESSION, seq=seq, wall_ns=NOW, name=name, detail=(("k", "v"),)
    )


def report(**changes: object) -> ModelReport:
    return replace(ModelReport(model=MODEL), **changes)  # type: ignore[arg-type]


def birth(
    device: str = "dev-1",
    seq: int = 1,
    *,
    session: SessionId = SESSION,
    models: tuple[ModelReport, ...] = (ModelReport(model=MODEL),),
    attributes: tuple[tuple[str, str], ...] = (),
) -> Status:
    return Status(
        device=DeviceId(device), session=session, seq=seq, online=True, attributes=attributes, models=models
    )


def death(device: str = "dev-1", *, session: SessionId = SESSION) -> Status:
    return Status(device=DeviceId(device), session=session, seq=2**62, online=False)


def device(name: str, *, online: bool = True, cohort: str = "", **reported: object) -> DeviceRecord:
    """A device with one report; ``reported`` are fields of it."""
    attributes = (("cohort", cohort),) if cohort else ()
    return DeviceRecord(
        device=DeviceId(name),
        session=SESSION,
        seq=1,
        online=online,
        attributes=attributes,
        models=(report(**reported),),
    )


def publish_artifact(
    folder: Path, *, seed: int = 0, groups: int = 6, group_rows: int = 2000
) -> tuple[Tiny, Digest]:
    """A small artifact with ``groups`` training groups in ``folder`` under its digest's name."""
    tiny = classifier(NAMES, ("low", "mid", "high"), seed=seed, name=MODEL)
    spec = tiny.reference.spec
    profiles = []
    for k in range(groups):
        rng = np.random.default_rng([seed, k])
        rows = (rng.normal(size=(group_rows, len(NAMES))) + rng.normal(0, 0.05, len(NAMES))).astype(
            np.float32
        )
        profiles.append((f"group-{k}", tiny_count(tiny, rows)))
    total = profiles[0][1]
    for _, profile in profiles[1:]:
        total = total.merge(profile)
    reference = Reference(spec=spec, total=total, groups=tuple(profiles))
    data = sealed(tiny.graph(), to_metadata(tiny.manifest, reference, tiny.golden, {"passed": True}))
    found = ids.digest_of(data)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{found}.onnx").write_bytes(data)
    return tiny, found


def tiny_count(tiny: Tiny, rows: NDArray[np.float32]) -> Profile:
    """The profile of ``rows`` with the model's own answers."""
    labels, scores = tiny.answer(rows)
    binner = Binner(tiny.reference.spec, probabilities=True)
    binner.observe(rows, labels, scores.astype(np.float32))
    return binner.take()
