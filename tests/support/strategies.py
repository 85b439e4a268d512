"""Hypothesis strategies for every value of the contract."""

import dataclasses
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from edge_runtime.contract import ids, messages
from edge_runtime.contract.codec import MAX_LABELLED
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.latency import LatencyHistogram, observe_ns
from edge_runtime.contract.profile import Binner, CellSpec, FeatureCells, Profile
from edge_runtime.contract.release import EVERYONE, Release, TrialGate

names = st.from_regex(ids.NAME, fullmatch=True)
sessions = st.from_regex(ids.SESSION, fullmatch=True).map(ids.session_id)
digests = st.from_regex(ids.DIGEST, fullmatch=True).map(ids.digest)
devices = names.map(ids.device_id)
models = names.map(ids.model_name)
fleets = names.map(ids.fleet_id)
cohorts = names.map(ids.cohort_id)
rollouts = names.map(ids.rollout_id)
counts = st.integers(0, 2**63 - 1)
few = st.integers(0, 2**40)
prose = st.text(max_size=80)
optional_digests = st.none() | digests


def tables(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Sorted (name, value) pairs, as messages carry them."""
    return st.dictionaries(prose, values, max_size=5).map(lambda found: tuple(sorted(found.items())))


durations = npst.arrays(np.int64, st.integers(0, 60), elements=st.integers(-10, 2**53))
latencies: st.SearchStrategy[LatencyHistogram] = durations.map(observe_ns)

float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
any_float32s = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, np.nan, np.inf, -np.inf])


@st.composite
def feature_cells(draw: st.DrawFn, name: str) -> FeatureCells:
    edges = draw(st.sets(float32s.map(lambda x: x + 0.0), min_size=1, max_size=6))
    return FeatureCells(name, tuple(sorted(edges)))


@st.composite
def specs(draw: st.DrawFn, *, classes: st.SearchStrategy[int] | None = None) -> CellSpec:
    width = draw(st.integers(1, 4))
    return CellSpec(
        tuple(draw(feature_cells(f"f{j}")) for j in range(width)),
        draw(feature_cells("score")),
        draw(st.integers(0, 4) if classes is None else classes),
    )


Seen = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]


@st.composite
def seen_rows(draw: st.DrawFn, spec: CellSpec, max_rows: int = 12) -> Seen:
    """Rows with labels and scores as an engine might return them, NaN and nonsense included."""
    n = draw(st.integers(0, max_rows))
    rows = draw(npst.arrays(np.float32, (n, len(spec.features)), elements=any_float32s))
    labels = draw(npst.arrays(np.int64, n, elements=st.integers(0, max(0, spec.classes - 1))))
    scores = draw(
        npst.arrays(np.float32, (n, max(1, spec.classes)), elements=st.floats(0, 1, width=32) | any_float32s)
    )
    return rows, labels, scores


@st.composite
def profiles(draw: st.DrawFn, spec: CellSpec) -> Profile:
    binner = Binner(spec, probabilities=spec.classes > 0)
    binner.observe(*draw(seen_rows(spec)))
    return binner.take()


reports = st.builds(
    messages.ModelReport,
    model=models,
    state=st.sampled_from(messages.SLOT_STATES),
    serving=optional_digests,
    previous=optional_digests,
    candidate=optional_digests,
    rollout=st.text(max_size=64),
    revision=counts,
    outcome=st.sampled_from(messages.OUTCOMES),
    outcome_digest=optional_digests,
    reason=prose,
    quarantined=st.lists(digests, max_size=3).map(tuple),
)
statuses = st.builds(
    messages.Status,
    device=devices,
    session=sessions,
    seq=counts,
    online=st.booleans(),
    attributes=tables(prose),
    models=st.lists(reports, max_size=3).map(tuple),
    last_exit=prose,
    restarts=counts,
    clock=st.sampled_from(messages.CLOCKS),
)
healths = st.builds(messages.Health, **{field.name: counts for field in dataclasses.fields(messages.Health)})


@st.composite
def windows(draw: st.DrawFn) -> messages.Window:
    spec = draw(specs())
    seq = draw(counts)
    seq_lo = draw(st.integers(0, seq))
    labelled = draw(few)
    return messages.Window(
        device=draw(devices),
        session=draw(sessions),
        seq=seq,
        seq_lo=seq_lo,
        model=draw(models),
        digest=draw(digests),
        start_ns=draw(counts),
        end_ns=draw(counts),
        synced=draw(st.booleans()),
        profile=draw(profiles(spec)),
        latency=draw(latencies),
        health=draw(healths),
        refused=draw(tables(few)),
        failed=draw(few),
        labelled=labelled,
        correct=draw(st.integers(0, labelled)),
        windows=draw(st.integers(1, seq - seq_lo + 1)),
        queueing=draw(latencies),
    )


events = st.builds(
    messages.Event,
    device=devices,
    session=sessions,
    seq=counts,
    wall_ns=counts,
    name=st.text(max_size=64),
    detail=tables(prose),
)


@st.composite
def labels(draw: st.DrawFn) -> messages.Labels:
    start_ns, end_ns = sorted((draw(counts), draw(counts)))
    labelled = draw(st.integers(1, MAX_LABELLED))
    return messages.Labels(
        device=draw(devices),
        session=draw(sessions),
        seq=draw(counts),
        source=ids.source_id(draw(models)),
        model=draw(models),
        digest=draw(digests),
        start_ns=start_ns,
        end_ns=end_ns,
        labelled=labelled,
        correct=draw(st.integers(0, labelled)),
    )


acks = st.builds(
    messages.Ack, device=devices, session=sessions, seqs=st.lists(counts, max_size=20).map(tuple)
)
commands = st.builds(
    messages.Command,
    device=devices,
    name=st.sampled_from(messages.COMMANDS),
    correlation=st.text(max_size=64),
)
bundles = st.builds(
    messages.TrustBundle, root_version=st.integers(1, 2**31), files=tables(st.binary(max_size=200))
)
signed_releases = st.builds(
    messages.SignedRelease, payload=st.binary(max_size=300), signatures=tables(st.binary(max_size=80))
)

any_message = st.one_of(statuses, windows(), events, labels(), acks, commands, bundles, signed_releases)

releases = st.builds(
    Release,
    fleet=fleets,
    cohort=cohorts,
    model=models,
    rollout=rollouts,
    revision=st.integers(1, 2**63 - 1),
    threshold=st.integers(0, EVERYONE),
    candidate=optional_digests,
    incumbent=optional_digests,
    attempt=st.integers(1, 2**63 - 1),
    trial=st.builds(
        TrialGate,
        predictions=counts,
        seconds=st.floats(0, 1e9),
        starts=st.integers(1, 1000),
        max_refused=st.floats(0, 1),
    ),
)


def plain(max_leaves: int = 20) -> st.SearchStrategy[Any]:
    """Whatever msgpack can carry."""
    leaves = (
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.text(max_size=20)
        | st.binary(max_size=40)
    )
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=5)
            | st.dictionaries(st.text(max_size=10) | st.binary(max_size=4), inner, max_size=5)
        ),
        max_leaves=max_leaves,
    )


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with some flipped, cut out or put in."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "end"]))
        if how == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif how == "cut":
            del data[at : at + draw(st.integers(1, 8))]
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        else:
            del data[at:]
    return bytes(data)


@st.composite
def replaced(draw: st.DrawFn, document: Any, values: st.SearchStrategy[Any]) -> Any:
    """A copy of nested lists and tables with one value, anywhere in it, removed or replaced."""
    if isinstance(document, dict) and document and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(list(document)))
        changed = dict(document)
        if draw(st.integers(0, 5)):
            changed[key] = draw(replaced(document[key], values))
        else:
            del changed[key]
        return changed
    if isinstance(document, list) and document and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(document) - 1))
        return [*document[:at], draw(replaced(document[at], values)), *document[at + 1 :]]
    return draw(values)


def some_digest(seed: int) -> Digest:
    """A digest that depends on ``seed`` alone."""
    return ids.digest_of(seed.to_bytes(8, "little"))
