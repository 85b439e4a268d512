"""Compares an artifact, run by the device's own engine, with the pipeline it stands for.

Scores agree within the project's tolerance, absolutely or relative to the reference. Labels agree wherever the
reference's two best scores differ by more than that. The reference is described in `converters.reference`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from converters import signature as signatures
from converters import table as tables
from converters.lowering import lower
from converters.lowering.graph import Lowering
from converters.onnx_export import fallback
from converters.probe_inputs import BATCH, Probes
from converters.reference import Acceptance, Answers, answers
from converters.report import KindResult, ParityReport, WorstRow
from converters.signature import Signature
from converters.table import Column, InputDtype, Rows, Table
from edge_runtime.contract.errors import ArtifactError, ParityError
from edge_runtime.contract.manifest import TOLERANCE, Label, agrees
from edge_runtime.contract.profile import CellSpec
from edge_runtime.engine import Engine

Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, how much of it is done, and how much there is."""

WORST_ROWS: Final = 10
_RAGGED: Final = (1, 2, 3, 5, 8, 13, 64)


class ParityFailure(ParityError):
    """The artifact and the pipeline disagree; ``report`` says where, the message which step and what to do."""

    def __init__(self, report: ParityReport, step: str) -> None:
        super().__init__(
            f"{step} disagrees with its graph: {report.summary()}; use another step, or other options, in its place, "
            "or leave out of the training data what makes the worst row special"
        )
        self.report = report


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
    report, not raised.

    Raises:
        UnsupportedPipeline: the pipeline or ``X`` is not understood.
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
        takes=Acceptance(
            missing=np.array([f.missing for f in manifest.features]),
            infinite=np.array([f.infinite for f in manifest.features]),
            unseen=np.array([f.unseen for f in manifest.features]),
        ),
        probes=probes,
        seed=seed,
    )
    report = compare(engine, signature, table, rows, progress=progress, total=sum(rows.sizes.values()))
    certificate = engine.info.certificate
    arithmetic = certificate.get("arithmetic", "")
    return replace(
        report,
        probes=probes,
        seed=seed,
        arithmetic=arithmetic if isinstance(arithmetic, str) else "",
        coverage=rows.coverage,
        notes=tuple(lowered.notes),
    )


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
    """The probe rows of one lowered pipeline."""
    return Probes(
        table.rows(lowered.dtype),
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

    Rows of the kind ``batch`` are also run one by one and in groups of several sizes.
    """
    tallies: dict[str, _Tally] = {}
    done = 0
    for kind, rows in probes:
        tally = tallies.setdefault(kind, _Tally(kind, signature.labels, table.columns))
        wanted = answers(signature, table, rows)
        for labels, scores in _runs(engine, rows, batches=kind == BATCH):
            tally.add(rows, labels, scores, wanted)
        done += len(rows)
        if progress is not None:
            progress("prove", done, max(total, done))
    return _report(engine, tallies)


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
    yield engine.run(rows)
    if not batches:
        return
    for sizes in ((1,), _RAGGED):
        parts = []
        start, turn = 0, 0
        while start < len(rows):
            size = sizes[turn % len(sizes)]
            parts.append(engine.run(rows[start : start + size]))
            start, turn = start + size, turn + 1
        labels = [part[0] for part in parts if part[0] is not None]
        yield (np.concatenate(labels) if labels else None), np.concatenate([part[1] for part in parts])


@dataclass(slots=True)
class _Tally:
    """Counts one kind of row while it is compared."""

    kind: str
    labels: tuple[tuple[Label, ...], ...]
    columns: tuple[Column, ...]
    rows: int = 0
    refused: int = 0
    ties: int = 0
    label_mismatches: int = 0
    score_mismatches: int = 0
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0
    worst: list[WorstRow] = field(default_factory=list)

    def add(
        self, rows: Rows, labels: NDArray[np.int64] | None, scores: NDArray[np.float32], wanted: Answers
    ) -> None:
        kept = wanted.accepted
        if kept.any() and scores.shape != wanted.scores.shape:
            raise ArtifactError(
                f"the artifact's scores have shape {scores.shape}, the pipeline's {wanted.scores.shape}"
            )
        fits, absolute, relative = _judge(scores[kept], wanted.scores[kept, : scores.shape[1]])
        ties = wanted.ties[kept].any(axis=1)
        differs = np.zeros(len(fits), np.bool_)
        if labels is not None:
            apart = (labels.reshape(len(rows), -1) != wanted.labels)[kept]
            differs = (apart & ~wanted.ties[kept]).any(axis=1)
        self.rows += len(fits)
        self.refused += int((~kept).sum())
        self.ties += int(ties.sum())
        self.label_mismatches += int(differs.sum())
        self.score_mismatches += int((~fits).sum())
        self.max_abs_error = max(self.max_abs_error, float(absolute.max(initial=0.0)))
        self.max_rel_error = max(self.max_rel_error, float(relative.max(initial=0.0)))
        source = np.flatnonzero(kept)
        for i in np.lexsort((-relative, ~differs))[:WORST_ROWS]:
            at = source[i]
            self.worst.append(
                WorstRow(
                    kind=self.kind,
                    values=tuple(map(_shown, self.columns, rows[at].tolist())),
                    label=None if labels is None else self._label(labels.reshape(len(rows), -1)[at]),
                    expected_label=None if labels is None else self._label(wanted.labels[at]),
                    scores=tuple(scores[at].tolist()),
                    expected_scores=tuple(wanted.scores[at].tolist()),
                    abs_error=float(absolute[i]),
                    rel_error=float(relative[i]),
                    label_differs=bool(differs[i]),
                )
            )
        self.worst = sorted(self.worst, key=_severity)[:WORST_ROWS]

    def _label(self, indices: NDArray[np.int64]) -> Label:
        found = [labels[index] for labels, index in zip(self.labels, indices.tolist(), strict=True)]
        return found[0] if len(found) == 1 else str(found)

    def result(self) -> KindResult:
        return KindResult(
            rows=self.rows,
            refused=self.refused,
            ties=self.ties,
            label_mismatches=self.label_mismatches,
            score_mismatches=self.score_mismatches,
            max_abs_error=self.max_abs_error,
            max_rel_error=self.max_rel_error,
        )


def _shown(column: Column, value: float) -> Label:
    """A cell as a person knows it: a number, or the category behind a code."""
    if column.vocabulary is None or math.isnan(value):
        return value
    return "(a value not seen in training)" if value < 0 else column.vocabulary[int(value)]


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


def _judge(
    scores: NDArray[np.float32], wanted: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    """Per row (n,): whether all scores agree, the largest error, and the largest relative to max(1, abs(wanted))."""
    with np.errstate(over="ignore", invalid="ignore"):
        # A reference beyond float32 can only be answered with an infinity.
        beyond = np.isinf(scores) & (scores == wanted.astype(np.float32))
        error = np.abs(scores.astype(np.float64) - wanted)
    fits = agrees(scores, wanted) | beyond
    error = np.where(beyond | (fits & np.isnan(error)), 0.0, np.where(np.isnan(error), np.inf, error))
    relative = error / np.maximum(1.0, np.abs(np.nan_to_num(wanted)))
    return fits.all(axis=1), error.max(axis=1, initial=0.0), relative.max(axis=1, initial=0.0)


def _severity(row: WorstRow) -> tuple[bool, float]:
    return not row.label_differs, -row.rel_error


def _report(engine: Engine, tallies: dict[str, _Tally]) -> ParityReport:
    results = {kind: tally.result() for kind, tally in tallies.items()}
    worst = sorted((row for tally in tallies.values() for row in tally.worst), key=_severity)
    # One row of each kind stays, so that the worst synthetic row is known when worse rows are of another kind.
    kept = {id(row): row for row in worst[:WORST_ROWS]}
    for tally in tallies.values():
        kept.update({id(row): row for row in tally.worst[:1]})
    return ParityReport(
        digest=engine.digest,
        rows=sum(r.rows for r in results.values()),
        refused=sum(r.refused for r in results.values()),
        ties=sum(r.ties for r in results.values()),
        label_mismatches=sum(r.label_mismatches for r in results.values()),
        score_mismatches=sum(r.score_mismatches for r in results.values()),
        max_abs_error=max((r.max_abs_error for r in results.values()), default=0.0),
        max_rel_error=max((r.max_rel_error for r in results.values()), default=0.0),
        by_probe_kind=results,
        worst_rows=tuple(sorted(kept.values(), key=_severity)),
        features=tuple(feature.name for feature in engine.info.manifest.features),
        tolerance=TOLERANCE,
    )
