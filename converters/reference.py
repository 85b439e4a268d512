"""The pipeline's own answers, and what float32 does to them.

The reference is what the pipeline says about the values a device can hold: float32, widened to float64. scikit-learn
keeps float32 input in float32 and answers a little differently for it, so the dtype has to be part of the definition.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from converters.signature import Signature, by_position
from converters.table import Rows, Table, spread
from edge_runtime.contract.errors import UnsupportedPipeline
from edge_runtime.contract.manifest import agrees, ties

CHUNK: Final = 4096
"""Rows per call: large enough to hide what a call costs, small enough to stay in the cache."""

LABEL_SHARE: Final = 0.001
SCORE_SHARE: Final = 0.25
"""Training rows whose answer float32 may change: labels up to 0.1 % (or one row), scores up to 25 %.

A split often lies exactly on a value that a column takes, halfway between two others; such rows stand on a knife's
edge and fall either way with the last bit. Up to 13 % of the rows of the classic data sets do, one tree's vote
each, without a change of label. A column that float32 cannot hold (a Unix timestamp) changes most rows.
"""

COARSE: Final = 1e-5
"""Steps between float32 values larger than this share of a column's spread mean that float32 cannot hold the column."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answers:
    """What the pipeline says about n rows.

    Attributes:
        labels: (n,) int64 class indices; zeros for a regressor.
        scores: (n, C) float64; C is 1 for a regressor.
        accepted: (n,) bool; rows the pipeline itself refuses hold label -1 and NaN scores.
        reason: why it refuses one of them; empty when it refuses none.
    """

    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    accepted: NDArray[np.bool_]
    reason: str = ""

    @property
    def ties(self) -> NDArray[np.bool_]:
        """(n,) bool: the two best scores differ by no more than the tolerance, so either label is right."""
        return ties(self.scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Float32Effect:
    """How many training rows the pipeline answers differently as passed and as float32."""

    rows: int
    labels_changed: int
    scores_changed: int
    max_change: float


def answers(signature: Signature, rows: Rows) -> Answers:
    """The reference answers for ``rows`` (n, F) float32."""
    scores = np.full((len(rows), max(1, len(signature.labels))), np.nan)
    labels = np.full(len(rows), -1, np.int64)
    reason = ""
    for start in range(0, len(rows), CHUNK):
        part = slice(start, min(start + CHUNK, len(rows)))
        reason = _fill(signature, rows, part, labels, scores) or reason
    return Answers(labels=labels, scores=scores, accepted=labels >= 0, reason=reason)


def _fill(
    signature: Signature,
    rows: Rows,
    part: slice,
    labels: NDArray[np.int64],
    scores: NDArray[np.float64],
) -> str:
    """Answers one part; returns why a row was refused, or nothing."""
    try:
        labels[part], scores[part] = ask(signature, rows[part].astype(np.float64))
    except ValueError as e:
        # One bad row (a value that overflows after scaling) makes scikit-learn refuse all of them: find it by halves.
        if part.stop - part.start == 1:
            return str(e)
        middle = (part.start + part.stop) // 2
        first = _fill(signature, rows, slice(part.start, middle), labels, scores)
        return _fill(signature, rows, slice(middle, part.stop), labels, scores) or first
    return ""


def ask(signature: Signature, X: Any) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Class indices (n,) and scores (n, C) of ``X`` exactly as passed; raises `ValueError` as scikit-learn does."""
    with by_position():
        predicted = np.asarray(signature.pipeline.predict(X))
        if signature.task == "regressor":
            return np.zeros(len(predicted), np.int64), predicted.astype(np.float64).reshape(-1, 1)
        scores = np.asarray(signature.pipeline.predict_proba(X), np.float64)
    classes: NDArray[Any] = np.asarray(signature.estimator.fitted.classes_)
    return np.searchsorted(classes, predicted).astype(np.int64), scores


def changed(found: Answers, wanted: Answers) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(n,) masks of rows whose label, and whose score, differ between two sets of answers; ties have no label."""
    scores = ~np.asarray(agrees(found.scores, wanted.scores).all(axis=1))
    return np.asarray((found.labels != wanted.labels) & ~wanted.ties), scores


def float32_effect(signature: Signature, table: Table, reference: Answers) -> Float32Effect:
    """Compares the pipeline's answers on the training rows as passed with its answers on float32.

    Raises `UnsupportedPipeline` when more rows change than `LABEL_SHARE` and `SCORE_SHARE` allow, naming the column
    behind most of the change and a remedy. Where that column is too coarse in float32, `LABEL_SHARE` holds for
    scores too.
    """
    given = _as_passed(signature, table.given)
    labels, scores = changed(given, reference)
    effect = Float32Effect(
        rows=len(table.rows),
        labels_changed=int(labels.sum()),
        scores_changed=int(scores.sum()),
        max_change=float(np.abs(given.scores - reference.scores).max()),
    )
    few, many = max(1, LABEL_SHARE * effect.rows), SCORE_SHARE * effect.rows
    moved = np.flatnonzero(labels | scores)
    coarse = _steps(table) > COARSE * spread(table.wide)
    excessive = effect.labels_changed > few or effect.scores_changed > many
    if excessive or (len(moved) > few and coarse.any()):
        looked_at = moved[:512]
        blame = _blame(signature, table, given, looked_at)
        worst = int(blame.argmax())
        if excessive or (coarse[worst] and blame[worst]):
            share = f"{blame[worst]} of {len(looked_at)} rows looked at"
            cause = _cause(table, worst, share, coarse=bool(coarse[worst])) if blame[worst] else _DTYPE_CAUSE
            raise UnsupportedPipeline(
                f"float32, which devices send, changes the pipeline's answer on {len(moved)} of {effect.rows} training "
                f"rows ({effect.labels_changed} labels, scores by up to {effect.max_change:.3g}); {cause}"
            )
    return effect


def _as_passed(signature: Signature, X: Any) -> Answers:
    labels, scores = ask(signature, X)
    return Answers(labels=labels, scores=scores, accepted=np.ones(len(labels), np.bool_))


def _blame(signature: Signature, table: Table, given: Answers, rows: NDArray[np.intp]) -> NDArray[np.int64]:
    """(F,) how many of ``rows`` change when one column alone is rounded to float32."""
    base = Answers(labels=given.labels[rows], scores=given.scores[rows], accepted=given.accepted[rows])
    counts = np.zeros(signature.width, np.int64)
    for j in range(signature.width):
        rounded = table.wide[rows].copy()
        rounded[:, j] = table.rows[rows, j]
        labels, scores = changed(_as_passed(signature, rounded), base)
        counts[j] = int((labels | scores).sum())
    return counts


def _steps(table: Table) -> NDArray[np.float64]:
    """(F,) the distance between neighbouring float32 values at the largest value of each column."""
    largest: Rows = np.abs(np.nan_to_num(table.rows)).max(axis=0)
    return np.spacing(largest).astype(np.float64)


_REFIT: Final = "fit on X.astype(numpy.float32).astype(numpy.float64)"
_DTYPE_CAUSE: Final = f"the scaler rounds float32 rows differently from float64 ones; {_REFIT}"


def _cause(table: Table, worst: int, share: str, *, coarse: bool) -> str:
    start = f"most of it comes from column {table.names[worst]!r} ({share})"
    if not coarse:
        return f"{start}, whose values lie exactly on splits; {_REFIT}"
    middle = f"{float(np.nanmedian(table.wide[:, worst])):.6g}"
    return (
        f"{start}, whose float32 values near {middle} lie {_steps(table)[worst]:.3g} apart. "
        f"Subtract {middle} from the column in float64 before the pipeline, on the device too"
    )
