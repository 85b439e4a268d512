"""The pipeline's own answers, what it accepts, and what float32 does to it.

The reference is what the pipeline says about the values that a device can hold: those of the artifact's input dtype,
widened to float64. scikit-learn keeps float32 input in float32 and answers a little differently for it, so the dtype
has to be part of the definition.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import numpy as np
from joblib import parallel_config
from numpy.typing import NDArray
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import FixedThresholdClassifier, TunedThresholdClassifierCV
from sklearn.pipeline import Pipeline
from threadpoolctl import ThreadpoolController

from converters.signature import Signature, by_position, final
from converters.table import InputDtype, Rows, Table, spread
from edge_runtime.contract.errors import InputError, UnsupportedPipeline
from edge_runtime.contract.manifest import TOLERANCE, Label, agrees, undecided
from edge_runtime.contract.ranges import Limits

CHUNK: Final = 4096
"""Rows per call: large enough to hide what a call costs, small enough to stay in the cache."""

_FEW: Final = 64
"""Rows per call where the pipeline is asked for few at a time."""

Index = NDArray[np.int64]

REFUSALS: Final = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
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
    """What the pipeline takes in each column.

    Attributes:
        missing: (F,) bool, a missing value.
        infinite: (F,) bool, either infinity; False for a column of categories.
        unseen: (F,) bool, a category that was not in training; False for a column of numbers.
        only: (k,) distinct training values of each column of numbers that takes no others.
        limits: the ranges that the model's maker declares, in the rows' dtype; None where there are none.
    """

    missing: NDArray[np.bool_]
    infinite: NDArray[np.bool_]
    unseen: NDArray[np.bool_]
    only: Mapping[int, Rows] = field(default_factory=dict)
    limits: Limits | None = None


def answers(signature: Signature, table: Table, rows: Rows, *, apart: bool = False) -> Answers:
    """The reference answers for coded ``rows`` (n, F) in the artifact's input dtype.

    With ``apart`` the pipeline is asked as a program would ask it that knows nothing of skiff: for a few rows at a
    time, and with as many threads as it likes.
    """
    outputs = max(1, len(signature.labels))
    labels = np.full((len(rows), outputs), -1, np.int64)
    found: list[tuple[Index, NDArray[np.float64]]] = []
    reason = ""
    step = _FEW if apart else CHUNK
    for start in range(0, len(rows), step):
        part = np.arange(start, min(start + step, len(rows)))
        reason = _fill(signature, table, rows, part, labels, found, apart=apart) or reason
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
    part: Index,
    labels: NDArray[np.int64],
    found: list[tuple[Index, NDArray[np.float64]]],
    *,
    apart: bool,
) -> str:
    """Answers one part; returns why a row was refused, or nothing."""
    if not part.size:
        return ""
    try:
        labels[part], scores = ask(signature, table.restore(rows[part], seed=int(part[0])), threads=apart)
    except REFUSALS as e:
        # One bad row (a value that overflows after scaling) makes scikit-learn refuse all of them: find it by halves.
        reason = f"{type(e).__name__}: {e}"
        if part.size == 1:
            return reason
        named = _named_rows(e, part.size)
        if named.size:
            _fill(signature, table, rows, np.delete(part, named), labels, found, apart=apart)
            return reason
        for half in np.array_split(part, 2):
            reason = _fill(signature, table, rows, half, labels, found, apart=apart) or reason
        return reason
    found.append((part, scores))
    return ""


def _named_rows(error: Exception, count: int) -> Index:
    """The rows that a radius classifier's error lists: those without a neighbour, often most of them."""
    match = re.search(r"No neighbors found for test samples array\(\[([\d,\s]*)\]", str(error))
    named = np.array([int(word) for word in match[1].split(",")] if match else [], np.int64)
    return named[named < count]


def ask(
    signature: Signature, X: Any, *, threads: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Class indices (n, L) and scores (n, C) of ``X`` exactly as passed; raises as scikit-learn does.

    ``threads`` leaves it to scikit-learn how many it takes; without, it takes one.
    """
    pipeline = signature.pipeline
    listed = np.printoptions(threshold=CHUNK)  # errors that list rows list all of them
    with by_position(), nullcontext() if threads else _one_thread(), listed:
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


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps scikit-learn's own loops on the calling thread.

    Parts are small: a histogram booster opens an OpenMP region per tree, and on a busy machine each of them waits for a
    thread that is not scheduled. Joblib's workers add up in any order, so the last bit would differ between runs.
    """
    with _thread_pools().limit(limits=1, user_api="openmp"), parallel_config(backend="sequential"):
        yield


@lru_cache(maxsize=1)
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all loaded libraries, which takes milliseconds


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

    def takes(value: float | Rows, columns: NDArray[np.bool_]) -> NDArray[np.bool_]:
        at = np.flatnonzero(columns)
        trial = np.repeat(base, len(at), axis=0)
        trial[np.arange(len(at)), at] = np.broadcast_to(value, len(columns))[at]
        found = np.zeros(len(columns), np.bool_)
        if len(at):
            found[at] = answers(signature, table, trial).accepted
        return found

    plain = ~coded
    known = [np.unique(column[np.isfinite(column)]) for column in rows.T]
    strange = np.array([_between(values) for values in known], rows.dtype)
    closed = plain & ~takes(strange, plain)
    return Acceptance(
        missing=takes(np.nan, np.ones(len(coded), np.bool_)),
        infinite=takes(np.inf, plain) & takes(-np.inf, plain),
        unseen=takes(-1.0, coded),
        only={j: known[j] for j in np.flatnonzero(closed).tolist() if len(known[j])},
    )


def _between(known: Rows) -> float:
    """A value in the middle of the largest gap between sorted distinct values (k,)."""
    if len(known) < 2:
        return float(known[0]) + 1.0 if len(known) else 0.0
    gap = int(np.diff(known).argmax())
    return float(known[gap] + (known[gap + 1] - known[gap]) / 2)


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
    try:
        labels, scores = ask(signature, X)
    except REFUSALS as e:
        reason = " ".join(str(e).split())
        raise InputError(
            "type", f"X: the pipeline refuses it ({reason[:300]}); pass what it was fitted on"
        ) from e
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
