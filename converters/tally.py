"""Counts what a comparison finds: per kind of row, over all outputs and for each of several.

Scores agree within the project's tolerance, absolutely or relative to the reference. Labels agree wherever the
reference's two best scores differ by more than that.
"""

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from converters.reference import Answers
from converters.report import KindResult, WorstRow, severity
from converters.table import Column, Rows
from edge_runtime.contract.errors import ArtifactError
from edge_runtime.contract.manifest import Label, agrees

WORST_ROWS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Judged:
    """Rows (n, F) that the pipeline takes, with both sides' answers and how far they are apart.

    ``labels`` are (n, L) indices, None for a regressor; ``fits``, ``absolute`` and ``relative`` are (n, C).
    """

    rows: Rows
    labels: NDArray[np.int64] | None
    scores: NDArray[np.float32]
    wanted: Answers
    fits: NDArray[np.bool_]
    absolute: NDArray[np.float64]
    relative: NDArray[np.float64]
    refused: int


@dataclass(slots=True)
class Tally:
    """One kind of row while it is compared.

    ``labels`` are those of each output that has classes; ``columns`` (F,) say how to show a row.
    """

    kind: str
    labels: tuple[tuple[Label, ...], ...]
    columns: tuple[Column, ...]
    _whole: "_Count | None" = None
    _outputs: "list[_Count]" = field(default_factory=list)

    def add(
        self, rows: Rows, labels: NDArray[np.int64] | None, scores: NDArray[np.float32], wanted: Answers
    ) -> None:
        """Adds rows (n, F) with the artifact's answers and the pipeline's; rows that it refuses are only counted."""
        kept = np.flatnonzero(wanted.accepted)
        if kept.size and scores.shape != wanted.scores.shape:
            raise ArtifactError(
                f"the artifact's scores have shape {scores.shape}, the pipeline's {wanted.scores.shape}"
            )
        if self._whole is None:
            self._start(scores.shape[1])
        found = scores[kept]
        fits, absolute, relative = judge(found, wanted.scores[kept, : scores.shape[1]])
        judged = _Judged(
            rows=rows[kept],
            labels=None if labels is None else labels.reshape(len(rows), -1)[kept],
            scores=found,
            wanted=wanted.at(kept),
            fits=fits,
            absolute=absolute,
            relative=relative,
            refused=len(rows) - len(kept),
        )
        assert self._whole is not None
        for count in (self._whole, *self._outputs):
            count.add(judged)

    def result(self) -> KindResult:
        """The figures over all outputs."""
        return KindResult() if self._whole is None else self._whole.result()

    def outputs(self) -> tuple[KindResult, ...]:
        """The figures of each output; none where there is only one."""
        return tuple(count.result() for count in self._outputs)

    @property
    def worst(self) -> list[WorstRow]:
        """The worst rows, the worst first."""
        return [] if self._whole is None else self._whole.worst

    def _start(self, width: int) -> None:
        every, several = slice(0, width), len(self.labels)
        self._whole = _Count(self, every, slice(0, max(1, several)), WORST_ROWS)
        for k, columns in enumerate(score_blocks(self.labels, width)):
            self._outputs.append(_Count(self, columns, slice(k, k + 1) if several else slice(0, 1), 1))


@dataclass(slots=True)
class _Count:
    """Counts the score columns ``scores`` and the label columns ``labels``, and keeps the worst ``keep`` rows."""

    tally: Tally
    scores: slice
    labels: slice
    keep: int
    rows: int = 0
    refused: int = 0
    ties: int = 0
    label_mismatches: int = 0
    score_mismatches: int = 0
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0
    worst: list[WorstRow] = field(default_factory=list)

    def add(self, judged: _Judged) -> None:
        fits = np.asarray(judged.fits[:, self.scores].all(axis=1))
        absolute = judged.absolute[:, self.scores].max(axis=1, initial=0.0)
        relative = judged.relative[:, self.scores].max(axis=1, initial=0.0)
        ties = judged.wanted.ties[:, self.labels]
        differs = np.zeros(len(fits), np.bool_)
        if judged.labels is not None:
            apart = judged.labels[:, self.labels] != judged.wanted.labels[:, self.labels]
            differs = (apart & ~ties).any(axis=1)
        self.rows += len(fits)
        self.refused += judged.refused
        self.ties += int(ties.any(axis=1).sum())
        self.label_mismatches += int(differs.sum())
        self.score_mismatches += int((~fits).sum())
        self.max_abs_error = max(self.max_abs_error, float(absolute.max(initial=0.0)))
        self.max_rel_error = max(self.max_rel_error, float(relative.max(initial=0.0)))
        for i in np.lexsort((-relative, ~differs))[: self.keep].tolist():
            row = WorstRow(
                kind=self.tally.kind,
                values=tuple(map(_shown, self.tally.columns, judged.rows[i].tolist())),
                label=None if judged.labels is None else self._label(judged.labels[i]),
                expected_label=None if judged.labels is None else self._label(judged.wanted.labels[i]),
                scores=tuple(judged.scores[i, self.scores].tolist()),
                expected_scores=tuple(judged.wanted.scores[i, self.scores].tolist()),
                abs_error=float(absolute[i]),
                rel_error=float(relative[i]),
                label_differs=bool(differs[i]),
            )
            self.worst.append(row)
        self.worst = sorted(self.worst, key=severity)[: self.keep]

    def _label(self, indices: NDArray[np.int64]) -> Label:
        names = self.tally.labels[self.labels]
        found = [labels[index] for labels, index in zip(names, indices[self.labels].tolist(), strict=True)]
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
            worst=self.worst[0] if self.worst else None,
        )


def score_blocks(labels: tuple[tuple[Label, ...], ...], width: int) -> tuple[slice, ...]:
    """Which of ``width`` score columns belong to each of several outputs; none where there is only one output."""
    if not labels:  # a regressor: one column per target
        return tuple(slice(j, j + 1) for j in range(width)) if width > 1 else ()
    if len(labels) == 1:
        return ()
    sizes = [len(each) for each in labels]
    if width != sum(sizes):
        sizes = [1] * len(labels)
    ends = np.cumsum(sizes).tolist()
    return tuple(slice(end - size, end) for end, size in zip(ends, sizes, strict=True))


def judge(
    scores: NDArray[np.float32], wanted: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    """(n, C) each: whether a score agrees, its error, and its error relative to max(1, abs(wanted))."""
    with np.errstate(over="ignore", invalid="ignore"):
        # A reference beyond float32 can only be answered with an infinity.
        beyond = np.isinf(scores) & (scores == wanted.astype(np.float32))
        error = np.abs(scores.astype(np.float64) - wanted)
    fits = agrees(scores, wanted) | beyond
    error = np.where(beyond | (fits & np.isnan(error)), 0.0, np.where(np.isnan(error), np.inf, error))
    return fits, error, error / np.maximum(1.0, np.abs(np.nan_to_num(wanted)))


def _shown(column: Column, value: float) -> Label:
    """A cell as a person knows it: a number, or the category behind a code."""
    if column.vocabulary is None or math.isnan(value):
        return value
    return "(a value not seen in training)" if value < 0 else column.vocabulary[int(value)]
