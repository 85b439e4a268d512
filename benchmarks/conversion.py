"""Conversion, file and single-row latency of skiff's artifact beside skl2onnx's plain graph and scikit-learn itself.

Timed row by row, the arms in turn, in one thread:
``engine``: skiff's artifact in the engine that devices run (`Engine.run`), its inputs and outputs bound;
``graph``: skiff's artifact through plain ``session.run``, so that only the graphs differ from
``plain``: the graph of skl2onnx through ``session.run``, with ONNX Runtime's own optimiser at its default;
``sklearn``: ``predict`` and, where there are scores, ``predict_proba`` or ``decision_function``.

Ratios are taken round by round; in brackets the middle half of the rounds. Conversion is everything but the proof;
the proof makes the probe rows and compares them.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from benchmarks import peers
from benchmarks.cases import CASES, Case
from benchmarks.measure import interleave, ratio
from converters import convert
from converters import signature as signatures
from converters import table as tables
from converters.lowering import lower
from converters.onnx_export import fallback
from converters.parity import probes_for
from converters.reference import accepted_values
from converters.signature import Signature, by_position
from converters.table import Rows, Table
from edge_runtime.contract.errors import ParityError, UnsupportedPipeline
from edge_runtime.engine import Engine

PROBES = 20_000
ROWS = 64
PER_KIND = 512
RATIOS = (("graph", "plain"), ("engine", "plain"), ("sklearn", "engine"))
_PROOF = frozenset({"probe", "look", "prove"})


class Stages:
    """Hears of progress and adds up the seconds of each stage."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self._stage = "read"
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Ends the stage before; how much of it was done does not matter here."""
        del done, total
        now = self._clock()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._since, self._stage = now, stage

    def proof(self) -> float:
        """Seconds spent on making probe rows and comparing them."""
        return sum(seconds for stage, seconds in self.seconds.items() if stage in _PROOF)

    def conversion(self) -> float:
        """Seconds spent on everything else."""
        return sum(self.seconds.values()) - self.proof()


def measure(case: Case, *, probes: int = PROBES, rounds: int = 11, calls: int = 200) -> dict[str, Any]:
    """The figures of one pipeline: times in microseconds or seconds as named, sizes in kB."""
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        warnings.simplefilter("ignore")  # what fitting and skl2onnx warn of is not measured here
        return _measured(case, probes, rounds, calls)


def _measured(case: Case, probes: int, rounds: int, calls: int) -> dict[str, Any]:
    pipeline, X = case.make()
    signature = signatures.read(pipeline)
    table = tables.read(signature, X)
    peer = peers.plain(pipeline, X, signature)
    figures: dict[str, Any] = {"pipeline": f"{case.name} ({case.data})", "skl2onnx s": round(peer.seconds, 2)}
    stages = Stages()
    with tempfile.TemporaryDirectory() as folder:
        try:
            artifact = convert(
                pipeline, X, Path(folder) / "m.onnx", name="bench", probes=probes, progress=stages
            )
        except (UnsupportedPipeline, ParityError) as e:
            return figures | {"skiff's answers": f"refused: {e}"}
        data = artifact.path.read_bytes()
    engine = Engine(data)
    timings = interleave(
        _arms(signature, table, engine, data, peer), rounds=rounds, calls=calls, round_seconds=0.06
    )
    return figures | {
        "convert s": round(stages.conversion(), 2),
        "prove s": round(stages.proof(), 2),
        "probes": artifact.report.rows,
        "file kB": _kilobytes(len(data)),
        "graph kB": _kilobytes(_graph_size(data)),
        "plain kB": _kilobytes(peer.size) if peer.size else "-",
        "skiff's answers": f"agree ({artifact.report.arithmetic})",
        "plain's answers": peers.verdict(peer, signature, table, _probes(signature, table, engine)),
        **{f"{name} us": round(timing.p50_us, 1) for name, timing in timings.items()},
        **{f"{a}/{b}": ratio(timings[a], timings[b]) for a, b in RATIOS if a in timings and b in timings},
    }


def _kilobytes(size: int) -> float:
    return round(size / 1e3, 1)


def _graph_size(data: bytes) -> int:
    """Bytes of the file without its metadata: reference profile, golden rows and certificate."""
    from onnx import ModelProto  # noqa: PLC0415 - for one figure

    model = ModelProto.FromString(data)
    del model.metadata_props[:]
    return len(model.SerializeToString())


def _arms(
    signature: Signature, table: Table, engine: Engine, data: bytes, peer: peers.Plain
) -> dict[str, Callable[[int], object]]:
    """One callable per arm, of the number of a row; rows are ready as each of them takes them."""
    rows = table.rows(_dtype(engine))
    rows = rows[:: max(1, len(rows) // ROWS)][:ROWS]
    session = peers.session_of(data)
    packed = [row[None] for row in rows]
    given = [table.restore(row) for row in packed] if table.vocabularies else packed
    count, name = len(rows), engine.info.manifest.input_name
    arms: dict[str, Callable[[int], object]] = {
        "engine": lambda i: engine.run(packed[i % count]),
        "graph": lambda i: session.run(None, {name: packed[i % count]}),
    }
    if peer.session is not None:
        run, feeds = peer.session.run, [peer.feed(each) for each in given]
        arms["plain"] = lambda i: run(None, feeds[i % count])
    arms["sklearn"] = _by_itself(signature, given)
    return arms


def _dtype(engine: Engine) -> tables.InputDtype:
    return "float64" if engine.info.manifest.input_dtype == "float64" else "float32"


def _by_itself(signature: Signature, given: Sequence[Any]) -> Callable[[int], object]:
    pipeline, count = signature.pipeline, len(given)
    more = getattr(pipeline, signature.score) if signature.score != "predict" else None

    def call(i: int) -> object:
        with by_position():
            return pipeline.predict(given[i % count]), more and more(given[i % count])

    return call


def _probes(signature: Signature, table: Table, engine: Engine) -> list[tuple[str, Rows]]:
    """Rows of every kind of the proof, some hundreds of each."""
    dtype = _dtype(engine)
    made = probes_for(
        signature,
        table,
        lower(signature, dtype=dtype, vocabularies=table.vocabularies, fallback=fallback),
        engine.info.reference.spec,
        takes=accepted_values(signature, table, table.rows(dtype)),
        probes=PER_KIND * 10,
        seed=0,
    )
    return list(made.limited(PER_KIND))


def run(cases: Sequence[Case] = CASES, told: Callable[[str], object] = str) -> list[dict[str, Any]]:
    """One row of figures per pipeline; ``told`` hears which one is next."""
    found = []
    for case in cases:
        told(case.name)
        found.append(measure(case))
    return found
