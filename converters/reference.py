"""The pipeline's own answers, what it accepts, and what float32 does to it.

The reference is what the pipeline says about the values that a device can hold: those of the artifact's input dtype,
widened to float64. scikit-learn keeps float32 input in float32 and answers a little differently for it, so the dtype
has to be part of the definition.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import FixedThresholdClassifier, TunedThresholdClassifierCV
from sklearn.pipeline import Pipeline

from converters.signature import Signature, by_position, final
from converters.table import InputDtype, Rows, Table, spread
from edge_runtime.contract.errors import UnsupportedPipeline
from edge_runtime.contract.manifest import TOLERANCE, Label, agrees, undecided

CHUNK: Final = 4096
"""Rows per call: large enough to hide what a call costs, small enough to stay in the cache."""

REFUSALS: Final = (ValueError, TypeError, KeyError, OverflowError, IndexError)
"""What scikit-learn raises for a row that it does not take."""

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
        labels: (n, L) int64 class indices, one column per output that has classes; one column of zeros for a regressor.
        scores: (n, C) float64.
        accepted: (n,) bool; rows the pipeline itself refuses hold label -1 and NaN scores.
        ties: (n, L) bool: the decision lies within the tolerance of falling otherwise, so either label is right.
        reason: why it refuses one of them; empty when it refuses none.
    """

    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    accepted: NDArray[np.bool_]
    ties: NDArray[np.bool_]
    reason: str = ""

    def at(self, rows: NDArray[Any]) -> "Answers":
        """The answers for some of the rows."""
        return Answers(
            labels=self.labels[rows],
            scores=self.scores[rows],
            accepted=self.accepted[rows],
            ties=self.ties[rows],
            reason=self.reason,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Float32Effect:
    """How many training rows the pipeline answers differently as passed and as the device's input dtype."""

    rows: int
    labels_changed: int
    scores_changed: int
    max_change: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Acceptance:
    """(F,) bool each: the columns in which the pipeline takes a missing value, an infinity, an unseen category."""

    missing: NDArray[np.bool_]
    infinite: NDArray[np.bool_]
    unseen: NDArray[np.bool_]


def answers(signature: Signature, table: Table, rows: Rows) -> Answers:
    """The reference answers for coded ``rows`` (n, F) in the artifact's input dtype."""
    outputs = max(1, len(signature.labels))
    labels = np.full((len(rows), outputs), -1, np.int64)
    found: list[tuple[slice, NDArray[np.float64]]] = []
    reason = ""
    for start in range(0, len(rows), CHUNK):
        part = slice(start, min(start + CHUNK, len(rows)))
        reason = _fill(signature, table, rows, part, labels, found) or reason
    width = max((scores.shape[1] for _, scores in found), default=1)
    scores = np.full((len(rows), width), np.nan)
    for part, values in found:
        scores[part] = values
    return Answers(
        labels=labels,
        scores=scores,
        accepted=labels[:, 0] >= 0,
        ties=ties_of(signature, scores),
        reason=reason,
    )


def _fill(  # noqa: PLR0917 - a recursion over parts of two results
    signature: Signature,
    table: Table,
    rows: Rows,
    part: slice,
    labels: NDArray[np.int64],
    found: list[tuple[slice, NDArray[np.float64]]],
) -> str:
    """Answers one part; returns why a row was refused, or nothing."""
    try:
        labels[part], scores = ask(signature, table.restore(rows[part], seed=part.start))
    except REFUSALS as e:
        # One bad row (a value that overflows after scaling) makes scikit-learn refuse all of them: find it by halves.
        if part.stop - part.start == 1:
            return f"{type(e).__name__}: {e}"
        middle = (part.start + part.stop) // 2
        first = _fill(signature, table, rows, slice(part.start, middle), labels, found)
        return _fill(signature, table, rows, slice(middle, part.stop), labels, found) or first
    found.append((part, scores))
    return ""


def ask(signature: Signature, X: Any) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Class indices (n, L) and scores (n, C) of ``X`` exactly as passed; raises as scikit-learn does."""
    pipeline = signature.pipeline
    with by_position():
        predicted = np.asarray(pipeline.predict(X))
        n = len(predicted)
        if signature.task == "regressor":
            return np.zeros((n, 1), np.int64), predicted.astype(np.float64).reshape(n, -1)
        labels = _indices(signature, predicted.reshape(n, -1))
        if signature.score == "predict":
            blocks = [np.eye(len(c))[labels[:, k]] for k, c in enumerate(signature.labels)]
            return labels, np.hstack(blocks)
        if signature.score == "negative_distance":
            return labels, -_distances(pipeline, X)
        scores = getattr(pipeline, signature.score)(X)
    if isinstance(scores, list):
        return labels, np.hstack([np.asarray(block, np.float64) for block in scores])
    return labels, np.asarray(scores, np.float64).reshape(n, -1)


def _indices(signature: Signature, predicted: NDArray[Any]) -> NDArray[np.int64]:
    found = np.empty(predicted.shape, np.int64)
    for k, labels in enumerate(signature.labels):
        place = {label: index for index, label in enumerate(labels)}
        try:
            found[:, k] = [place[value] for value in predicted[:, k].tolist()]
        except KeyError as e:
            raise UnsupportedPipeline(
                f"{type(final(signature.pipeline)).__name__} predicts {e.args[0]!r}, which is none of its classes"
            ) from e
    return found


def _distances(pipeline: Any, X: Any) -> NDArray[np.float64]:
    last = final(pipeline)
    if hasattr(last, "transform"):
        return np.asarray(pipeline.transform(X), np.float64)
    before = pipeline[:-1].transform(X) if isinstance(pipeline, Pipeline) and len(pipeline.steps) > 1 else X
    return np.asarray(euclidean_distances(before, last.cluster_centers_), np.float64)


def ties_of(signature: Signature, scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n, L) bool: whether the decision behind each label lies within the tolerance of falling otherwise.

    So it does where the pipeline's own scores (n, C) are NaN.
    """
    if not signature.labels:
        return np.zeros((len(scores), 1), np.bool_)
    last = final(signature.pipeline)
    if isinstance(last, FixedThresholdClassifier | TunedThresholdClassifierCV):
        found = _at_threshold(last, signature.single, scores)
    else:
        found = undecided(signature.score, signature.labels, scores)
    return found | np.isnan(scores).any(axis=1, keepdims=True)


def _at_threshold(last: Any, labels: tuple[Label, ...], scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n, 1) where the positive class's score lies at the threshold that chooses the label."""
    probabilities = scores.shape[1] == 2
    if probabilities and last.response_method == "decision_function":
        return np.zeros((len(scores), 1), np.bool_)  # the label goes by a score that is not here
    threshold: Any = getattr(last, "best_threshold_", getattr(last, "threshold", None))
    limit = (0.5 if probabilities else 0.0) if isinstance(threshold, str) else float(threshold)
    first = getattr(last, "pos_label", None) == labels[0]
    column = scores[:, [0 if first else 1]] if probabilities else -scores if first else scores
    return np.asarray(np.abs(column - limit) <= TOLERANCE)


def accepted_values(signature: Signature, table: Table, rows: Rows) -> Acceptance:
    """Asks the pipeline itself, column by column, on a training row with one value replaced."""
    base = rows[np.flatnonzero(~np.isnan(rows).any(axis=1))[:1]]
    if not len(base):
        base = rows[:1]
    coded = table.coded

    def takes(value: float, columns: NDArray[np.bool_]) -> NDArray[np.bool_]:
        at = np.flatnonzero(columns)
        trial = np.repeat(base, len(at), axis=0)
        trial[np.arange(len(at)), at] = value
        found = np.zeros(len(columns), np.bool_)
        if len(at):
            found[at] = answers(signature, table, trial).accepted
        return found

    plain = ~coded
    return Acceptance(
        missing=takes(np.nan, np.ones(len(coded), np.bool_)),
        infinite=takes(np.inf, plain) & takes(-np.inf, plain),
        unseen=takes(-1.0, coded),
    )


def changed(found: Answers, wanted: Answers) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(n,) masks of rows whose label, and whose score, differ between two sets of answers; ties have no label."""
    scores = ~np.asarray(agrees(found.scores, wanted.scores).all(axis=1))
    return np.asarray(((found.labels != wanted.labels) & ~wanted.ties).any(axis=1)), scores


def rounding_effect(
    signature: Signature, table: Table, reference: Answers, dtype: InputDtype
) -> tuple[Float32Effect, str]:
    """Compares the pipeline's answers on the training rows as passed with its answers on ``dtype``.

    The text is empty, or says which column is behind it when more rows change than `LABEL_SHARE` and `SCORE_SHARE`
    allow. Where that column is too coarse in float32, `LABEL_SHARE` holds for scores too.
    """
    given = _as_passed(signature, table.given)
    labels, scores = changed(given, reference)
    with np.errstate(invalid="ignore"):
        change = np.nan_to_num(np.abs(given.scores - reference.scores))
    effect = Float32Effect(
        rows=len(table.wide),
        labels_changed=int(labels.sum()),
        scores_changed=int(scores.sum()),
        max_change=float(change.max(initial=0.0)),
    )
    few, many = max(1, LABEL_SHARE * effect.rows), SCORE_SHARE * effect.rows
    moved = np.flatnonzero(labels | scores)
    coarse = (
        _steps(table) > COARSE * spread(table.wide)
        if dtype == "float32"
        else np.zeros(len(table.names), bool)
    )
    excessive = effect.labels_changed > few or effect.scores_changed > many
    if not excessive and not (len(moved) > few and coarse.any()):
        return effect, ""
    looked_at = moved[:512]
    blame = _blame(signature, table, given.at(looked_at), looked_at)
    worst = int(blame.argmax())
    if not excessive and not (coarse[worst] and blame[worst]):
        return effect, ""
    share = f"{blame[worst]} of {len(looked_at)} rows looked at"
    cause = _cause(table, worst, share, coarse=bool(coarse[worst])) if blame[worst] else _DTYPE_CAUSE
    return effect, (
        f"{dtype} input changes the pipeline's answer on {len(moved)} of {effect.rows} training rows "
        f"({effect.labels_changed} labels, scores by up to {effect.max_change:.3g}); {cause}"
    )


def _as_passed(signature: Signature, X: Any) -> Answers:
    labels, scores = ask(signature, X)
    return Answers(
        labels=labels,
        scores=scores,
        accepted=np.ones(len(labels), np.bool_),
        ties=ties_of(signature, scores),
    )


def _blame(signature: Signature, table: Table, base: Answers, rows: NDArray[np.intp]) -> NDArray[np.int64]:
    """(F,) how many of ``rows`` change when one column alone is rounded to float32."""
    narrow = table.rows("float32")
    counts = np.zeros(len(table.names), np.int64)
    for j in range(len(counts)):
        rounded = table.wide[rows].copy()
        rounded[:, j] = narrow[rows, j]
        labels, scores = changed(_as_passed(signature, table.restore(rounded)), base)
        counts[j] = int((labels | scores).sum())
    return counts


def _steps(table: Table) -> NDArray[np.float64]:
    """(F,) the distance between neighbouring float32 values at the largest value of each column."""
    largest = np.abs(np.nan_to_num(table.rows("float32"))).max(axis=0)
    return np.asarray(np.spacing(largest), np.float64)


_REFIT: Final = "fit on X.astype(numpy.float32).astype(numpy.float64)"
_DTYPE_CAUSE: Final = f"the pipeline rounds float32 rows differently from float64 ones; {_REFIT}"


def _cause(table: Table, worst: int, share: str, *, coarse: bool) -> str:
    start = f"most of it comes from column {table.names[worst]!r} ({share})"
    if not coarse:
        return f"{start}, whose values lie exactly on splits; {_REFIT}"
    middle = f"{float(np.nanmedian(table.wide[:, worst])):.6g}"
    return f"{start}, whose float32 values near {middle} lie {_steps(table)[worst]:.3g} apart"
