"""Compares an artifact, run by the device's own engine, with the pipeline it stands for.

What agrees and what does not is decided in `converters.tally`; the reference is described in `converters.reference`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from converters import ranges
from converters import signature as signatures
from converters import table as tables
from converters.lowering import lower
from converters.lowering.graph import Lowering
from converters.onnx_export import fallback
from converters.probe_inputs import (
    BATCH,
    EQUIDISTANT,
    EXTREME,
    FAR,
    HUGE,
    INFINITE,
    LIMIT,
    RANDOM,
    TRAINING,
    Probes,
)
from converters.reference import Acceptance, accepted_values, answers
from converters.report import KindResult, ParityReport, merged, ranges_of, severity
from converters.signature import Signature
from converters.table import Column, InputDtype, Rows, Table
from converters.tally import WORST_ROWS, Tally
from edge_runtime.contract.errors import ArtifactError, InputError, ParityError
from edge_runtime.contract.manifest import TOLERANCE, Golden, Label
from edge_runtime.contract.profile import CellSpec
from edge_runtime.contract.ranges import Limits
from edge_runtime.engine import Engine

Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, how much of it is done, and how much there is."""

TOGETHER: Final = 64
"""Rows that the engine runs at once: a graph that holds N training rows takes 8 · N bytes for each, several times over,
and is three times as fast where these stay in the cache."""

_RAGGED: Final = (1, 2, 3, 5, 8, 13, 64)


class ParityFailure(ParityError):
    """The artifact and the pipeline disagree; ``report`` says where, the message which step and what to do."""

    def __init__(self, report: ParityReport, step: str, doubts: Sequence[str] = ()) -> None:
        """``doubts`` are what the rules themselves hold possible, each with its remedy; see `Lowering.doubt`."""
        remedy = _advice(report) or "; ".join(doubts) or _OTHER_STEP
        super().__init__(f"{step} disagrees with its graph: {report.summary()}; {remedy}")
        self.report = report


_OTHER_STEP: Final = (
    "use another step, or other options, in its place, "
    "or leave out of the training data what makes the worst row special"
)
_BOUND: Final = (
    "every wrong row has a value far beyond the training rows, where the last bit of the pipeline's own sums decides: "
    "pass ranges='training' (or --range training), so that devices refuse such rows, or bound the columns in the first "
    "step, as MinMaxScaler(clip=True) does"
)
_NARROW: Final = (
    "every wrong row has a value far from the training rows, where the last bit of the pipeline's own sums decides: "
    "declare narrower ranges, and one for every feature"
)


def _advice(report: ParityReport) -> str:
    """What helps where only values far out go wrong; empty where others do."""
    wrong = {
        k for k, found in report.by_probe_kind.items() if found.label_mismatches + found.score_mismatches
    }
    if not wrong or not wrong <= {EXTREME, HUGE, FAR, INFINITE, LIMIT}:
        return ""
    return _NARROW if report.ranges else _BOUND


def check_parity(
    pipeline: Any,
    path: str | Path,
    X: Any,
    probes: int = 100_000,
    seed: int = 0,
    *,
    progress: Progress | None = None,
) -> ParityReport:
    """Compares the artifact at ``path`` with ``pipeline`` on about ``probes`` hostile rows built from ``X``.

    ``X`` is an (n, F) array or data frame like the one the pipeline was fitted on. Disagreement is in the
    report, not raised. The report repeats the remedies and notes of the artifact's certificate. Where the artifact
    declares ranges, rows outside are left out: devices refuse them.

    Raises:
        UnsupportedPipeline: the pipeline or ``X`` is not understood.
        InputError: no row of ``X`` lies inside the artifact's ranges.
        ArtifactError: the file is damaged, or was made from a pipeline of another shape.
    """
    engine = Engine(path)
    manifest = engine.info.manifest
    signature = signatures.read(pipeline)
    check_signature(engine, signature)
    table = tables.read(signature, X, vocabularies=tuple(f.vocabulary or None for f in manifest.features))
    dtype: InputDtype = "float64" if manifest.input_dtype == "float64" else "float32"
    lowered = lower(signature, dtype=dtype, vocabularies=table.vocabularies, fallback=fallback)
    rows = probes_for(
        signature,
        table,
        lowered,
        engine.info.reference.spec,
        takes=replace(
            accepted_values(signature, table, table.rows(dtype)),
            missing=np.array([f.missing for f in manifest.features]),
            infinite=np.array([f.infinite for f in manifest.features]),
            unseen=np.array([f.unseen for f in manifest.features]),
            limits=Limits.of(manifest.features, dtype),
        ),
        probes=probes,
        seed=seed,
    )
    certificate = engine.info.certificate
    real_rows = certificate.get("real_rows") is True
    every = with_golden(engine.info.golden, rows, real_rows=real_rows)
    total_rows = len(engine.info.golden.rows) + sum(rows.sizes.values())
    report = compare(engine, signature, table, every, progress=progress, total=total_rows)
    arithmetic = certificate.get("arithmetic", "")
    return replace(
        report,
        probes=probes,
        seed=seed,
        arithmetic=arithmetic if isinstance(arithmetic, str) else "",
        coverage=rows.coverage,
        remedies=_texts(certificate, "remedies"),
        notes=tuple(dict.fromkeys((*lowered.notes, *_texts(certificate, "notes"), *ranges.note(manifest)))),
        real_rows=real_rows,
        ranges=ranges_of(manifest),
    )


def _texts(certificate: Mapping[str, object], key: str) -> tuple[str, ...]:
    found = certificate.get(key)
    return tuple(text for text in found if isinstance(text, str)) if isinstance(found, list) else ()


def with_golden(golden: Golden, rows: Probes, *, real_rows: bool) -> Iterator[tuple[str, Rows]]:
    """The rows that every device checks before it serves, then the probe rows."""
    yield TRAINING if real_rows else RANDOM, golden.rows
    yield from rows


def probes_for(
    signature: Signature,
    table: Table,
    lowered: Lowering,
    spec: CellSpec,
    *,
    takes: Acceptance,
    probes: int,
    seed: int,
) -> Probes:
    """The probe rows of one lowered pipeline; raises `InputError` where no row lies inside its ranges."""
    rows = table.rows(lowered.dtype)
    if takes.limits is not None:
        rows = rows[~takes.limits.outside(rows).any(axis=1)]
        if not len(rows):
            raise InputError("range", f"X: none of {len(table.wide)} rows lies inside the artifact's ranges")
    return Probes(
        rows,
        takes,
        spec,
        lowered,
        vocabulary=np.array([0 if c.vocabulary is None else len(c.vocabulary) for c in table.columns]),
        ask=lambda trial: answers(signature, table, trial),
        probes=probes,
        seed=seed,
    )


def compare(
    engine: Engine,
    signature: Signature,
    table: Table,
    probes: Iterable[tuple[str, Rows]],
    *,
    progress: Progress | None = None,
    total: int = 0,
) -> ParityReport:
    """Runs every chunk of ``probes``, (kind, coded rows (n, F)), through both sides.

    Rows of the kind ``batch`` are run all at once, one by one, and in groups of several sizes. For rows of the kind
    ``equidistant`` the pipeline is also asked for few at a time: its own answer may depend on that.
    """
    tallies: dict[str, Tally] = {}
    done, undefined = 0, 0
    for kind, rows in probes:
        tally = tallies.setdefault(kind, Tally(kind, signature.labels, table.columns))
        wanted = answers(signature, table, rows)
        undefined += int((wanted.accepted & np.isnan(wanted.scores).any(axis=1)).sum())
        for labels, scores in _runs(engine, rows, batches=kind == BATCH):
            tally.add(rows, labels, scores, wanted)
            if kind == EQUIDISTANT:
                tally.add(rows, labels, scores, answers(signature, table, rows, apart=True))
        done += len(rows)
        if progress is not None:
            progress("prove", done, max(total, done))
    return replace(_report(engine, tallies), undefined=undefined)


def check_signature(engine: Engine, signature: Signature) -> None:
    """Raises `ArtifactError` when the artifact's manifest does not describe a pipeline of this signature."""
    manifest = engine.info.manifest
    given = manifest.multilabels or ((manifest.labels,) if manifest.labels else ())
    found = (manifest.task, manifest.score, len(manifest.features), [_typed(each) for each in given])
    wanted = (signature.task, signature.score, signature.width, [_typed(each) for each in signature.labels])
    for what, a, b in zip(("task", "score", "number of columns", "labels"), found, wanted, strict=True):
        if a != b:
            raise ArtifactError(f"the artifact was not made from this pipeline: its {what} is {a}, not {b}")


def _typed(labels: Iterable[Label]) -> list[tuple[str, Label]]:
    return [(type(label).__name__, label) for label in labels]


def _runs(
    engine: Engine, rows: Rows, *, batches: bool
) -> Iterator[tuple[NDArray[np.int64] | None, NDArray[np.float32]]]:
    groups: Sequence[Sequence[int]] = ((len(rows),), (1,), _RAGGED) if batches else ((TOGETHER,),)
    for sizes in groups:
        yield run(engine, rows, sizes)


def run(
    engine: Engine, rows: Rows, sizes: Sequence[int] = (TOGETHER,)
) -> tuple[NDArray[np.int64] | None, NDArray[np.float32]]:
    """What `Engine.run` says about ``rows`` (n, F), asked for in groups of ``sizes``, in turn."""
    parts: list[tuple[NDArray[np.int64] | None, NDArray[np.float32]]] = []
    start, turn = 0, 0
    while start < len(rows) or not parts:
        size = sizes[turn % len(sizes)]
        parts.append(engine.run(rows[start : start + size]))
        start, turn = start + size, turn + 1
    labels = [part[0] for part in parts if part[0] is not None]
    return (np.concatenate(labels) if labels else None), np.concatenate([part[1] for part in parts])


def worst_rows(report: ParityReport, table: Table, dtype: InputDtype) -> Rows:
    """The worst rows (m, F) of a report as the graph reads them."""
    found = [
        [_code(column, value) for column, value in zip(table.columns, row.values, strict=True)]
        for row in report.worst_rows
    ]
    return np.array(found, dtype).reshape(-1, len(table.columns))


def _code(column: Column, value: Label) -> float:
    if column.vocabulary is None or (isinstance(value, float) and math.isnan(value)):
        return float(value)
    return float(column.vocabulary.index(value)) if value in column.vocabulary else -1.0


def _report(engine: Engine, tallies: dict[str, Tally]) -> ParityReport:
    results = {kind: tally.result() for kind, tally in tallies.items()}
    outputs: list[dict[str, KindResult]] = []
    for kind, tally in tallies.items():
        for k, found in enumerate(tally.outputs()):
            if k == len(outputs):
                outputs.append({})
            outputs[k][kind] = found
    worst = sorted((row for tally in tallies.values() for row in tally.worst), key=severity)
    # One row of each kind stays: a step is blamed by what all kinds of rows say.
    kept = {id(row): row for row in worst[:WORST_ROWS]}
    kept.update({id(r.worst): r.worst for r in results.values() if r.worst is not None})
    together = merged(results.values())
    return ParityReport(
        digest=engine.digest,
        rows=together.rows,
        refused=together.refused,
        ties=together.ties,
        label_mismatches=together.label_mismatches,
        score_mismatches=together.score_mismatches,
        max_abs_error=together.max_abs_error,
        max_rel_error=together.max_rel_error,
        by_probe_kind=results,
        by_output=tuple(outputs),
        worst_rows=tuple(sorted(kept.values(), key=severity)),
        features=tuple(feature.name for feature in engine.info.manifest.features),
        tolerance=TOLERANCE,
    )
