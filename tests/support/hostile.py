"""Rows that try to tell an artifact from its pipeline, and the verdict, without a line of the converters' own proof.

`rows` makes them from the training rows and from the numbers found in the fitted objects; `verdict` asks the pipeline
and the device's `Runtime` about the same rows and says what it found.
"""

import itertools
import math
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd

from converters import convert
from edge_runtime.contract.errors import InputError, ParityError, UnsupportedPipeline
from edge_runtime.contract.manifest import TOLERANCE, undecided
from edge_runtime.engine import Engine
from edge_runtime.runtime import Runtime

REFUSALS = (ValueError, TypeError, KeyError, OverflowError, IndexError)
STRANGERS = ("never seen", "", "nan", "red ", "RED")
HUGE = (1e30, -1e30, 1e18, 3.4e38)
DENORMAL = 1e-42


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one pipeline: ``proven``, ``refused``, or ``wrong``; why; and how many rows were compared."""

    state: str
    detail: str = ""
    rows: int = 0


def verdict(fitted, X, path, *, probes=300, count=240, seed=0, extremes=True):
    """Converts ``fitted`` and holds the artifact against it on rows of our own."""
    try:
        artifact = convert(fitted, X, path, probes=probes, seed=seed)
    except (UnsupportedPipeline, ParityError) as e:
        return Verdict(state="refused", detail=f"{type(e).__name__}: {e}")
    manifest = artifact.manifest
    tried = rows(fitted, X, manifest.input_dtype, count=count, seed=seed + 1, extremes=extremes)
    problem, compared = compare(fitted, Engine(artifact.path), tried)
    return Verdict(state="wrong" if problem else "proven", detail=problem, rows=compared)


# --- rows ------------------------------------------------------------------------------------------------------


def numbers_of(X):
    """The places of the columns that hold plain numbers, and the rows as something to write into."""
    if not hasattr(X, "columns"):
        return list(range(X.shape[1]))
    return [j for j, name in enumerate(X.columns) if X[name].dtype.kind in "fiu"]


def edges_of(fitted, limit=400):
    """Finite numbers in the fitted attributes of an estimator and everything inside it."""
    found, seen, todo = [], set(), [fitted]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, np.ndarray) and thing.dtype.kind == "f" and thing.size:
            found.append(thing.ravel()[:64])
        elif isinstance(thing, np.ndarray) and thing.dtype == object:
            todo += thing.ravel().tolist()
        elif isinstance(thing, list | tuple):
            todo += thing
        elif isinstance(thing, dict):
            todo += thing.values()
        elif hasattr(thing, "threshold") and hasattr(thing, "children_left"):
            found.append(thing.threshold[:64])
        elif type(thing).__module__.startswith("sklearn") and hasattr(thing, "__dict__"):
            todo += vars(thing).values()
    values = np.concatenate([np.asarray(part, np.float64).ravel() for part in found] or [np.zeros(1)])
    values = np.unique(values[np.isfinite(values) & (np.abs(values) < 1e30)])
    return values[np.linspace(0, len(values) - 1, min(limit, len(values))).astype(int)]


def beside(values, steps, dtype):
    """Each value as ``dtype``, moved by as many representable values."""
    near = np.asarray(values, dtype)
    for _ in range(int(np.max(np.abs(steps), initial=0))):
        near = np.where(steps > 0, np.nextafter(near, dtype(np.inf)), near)
        near = np.where(steps < 0, np.nextafter(near, dtype(-np.inf)), near)
        steps = steps - np.sign(steps)
    return near


def rows(fitted, X, dtype, *, count, seed, extremes=True):
    """About ``count`` rows of the kind of ``X``, whose numbers are exact in ``dtype``; the training rows come first."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype).type
    frame = X.copy() if hasattr(X, "columns") else pd.DataFrame(np.asarray(X))
    plain = numbers_of(X)
    some = frame.iloc[: min(len(frame), count // 4)]
    made = frame.iloc[rng.integers(len(frame), size=count)].reset_index(drop=True)
    edges = edges_of(fitted)
    for j in plain:
        name = frame.columns[j]
        column = frame[name].to_numpy(np.float64)
        known = np.unique(column[np.isfinite(column)]) if np.isfinite(column).any() else np.zeros(1)
        values = made[name].to_numpy(np.float64).astype(kind)
        values = np.where(
            rng.random(count) < 1.0 / (1 + len(plain) / 2), _hostile(rng, known, edges, count, kind), values
        )
        made[name] = values.astype(np.float64)
    if extremes and plain:
        _scatter(made, rng, [frame.columns[j] for j in plain])
    for name in frame.columns:
        if frame[name].dtype == object or str(frame[name].dtype) in ("str", "category"):
            _strangers(made, rng, name)
    start = some.copy()
    for j in plain:
        name = frame.columns[j]
        start[name] = start[name].to_numpy(np.float64).astype(kind).astype(np.float64)
    together = pd.concat([start, made], ignore_index=True)
    return (
        together
        if hasattr(X, "columns")
        else together.to_numpy(np.asarray(X).dtype if X.dtype == object else None)
    )


def _hostile(rng, known, edges, count, kind):
    """Values beside training values, beside their midpoints, beside fitted numbers, and on grids."""
    middle = (known[1:] + known[:-1]) / 2 if len(known) > 1 else known
    span = known[-1] - known[0] or 1.0
    which = rng.integers(5, size=count)
    values = np.select(
        [which == k for k in range(4)],
        [
            rng.choice(known, count),
            rng.choice(middle, count),
            rng.choice(edges, count),
            np.rint(rng.choice(known, count)),
        ],
        known[0] + span * (3 * rng.random(count) - 1),
    )
    with np.errstate(over="ignore"):
        return beside(values.astype(kind), rng.integers(-2, 3, size=count), kind)


def _scatter(made, rng, names):
    """One value in each of the last rows: huge, denormal, zero, missing and infinite ones."""
    values = (*HUGE, DENORMAL, -DENORMAL, 0.0, -0.0, math.nan, math.inf, -math.inf)
    for i, value in enumerate(
        itertools.islice(itertools.cycle(values), min(len(made) // 4, 4 * len(values)))
    ):
        name = names[int(rng.integers(len(names)))]
        made.loc[len(made) - 1 - i, name] = float(np.float32(value))


def _strangers(made, rng, name):
    """Values that training did not have, and missing ones where it had those."""
    gaps = 0.3 if made[name].isna().any() else 0.0
    at = np.flatnonzero(rng.random(len(made)) < 0.1)
    values = [None if rng.random() < gaps else STRANGERS[int(rng.integers(len(STRANGERS)))] for _ in at]
    if str(made[name].dtype) == "category":
        made[name] = made[name].cat.add_categories(
            [v for v in STRANGERS if v not in made[name].cat.categories]
        )
    made.loc[at, name] = values


# --- verdict ---------------------------------------------------------------------------------------------------


def part_of(rows_, part):
    """Some rows of a frame or an array."""
    return rows_.iloc[part].reset_index(drop=True) if hasattr(rows_, "iloc") else rows_[part]


def _asked(fitted, score, rows_):
    """Predictions (n, L) as objects and scores (n, C) or None, exactly as scikit-learn gives them."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        predicted = np.asarray(fitted.predict(rows_))
        found = getattr(fitted, score)(rows_) if score in ("predict_proba", "decision_function") else None
    predicted = predicted.reshape(len(predicted), -1)
    if isinstance(found, list):
        found = np.hstack(found)
    return predicted, None if found is None else np.asarray(found, np.float64).reshape(len(predicted), -1)


def _accepted(ask, n, refusals):
    """{row: its answer} for the rows that ``ask`` does not refuse, found by halves; each answer comes from a batch."""
    found, todo = {}, [np.arange(n)] if n else []
    while todo:
        part = todo.pop()
        try:
            answer = ask(part)
        except refusals:
            if len(part) > 1:
                todo += [part[: len(part) // 2], part[len(part) // 2 :]]
            continue
        for k, i in enumerate(part.tolist()):
            found[i] = tuple(None if a is None else a[k] for a in answer)
    return found


def compare(fitted, engine, rows_):
    """(the first problem or nothing, how many rows were compared)."""
    manifest = engine.info.manifest
    runtime = Runtime(engine)
    n, limit = len(rows_), _threshold(fitted)
    wanted = _accepted(lambda part: _asked(fitted, manifest.score, part_of(rows_, part)), n, REFUSALS)
    given = _accepted(lambda part: _given(runtime, part_of(rows_, part)), n, (InputError,))
    for i, (predicted, scores) in wanted.items():
        if i not in given:
            if not _only_one_infinity(rows_, i):
                return f"row {i} {_row(rows_, i)}: the pipeline answers {predicted}, the device refuses it", 0
            continue
        problem = _differs(manifest, predicted, scores, given[i], limit)
        if problem and not _unsettled(fitted, manifest.score, part_of(rows_, np.array([i]))):
            return f"row {i} {_row(rows_, i)}: {problem}", 0
    problem = _batches(runtime, rows_, given) or _empty(runtime, rows_)
    return problem, len(wanted)


def _unsettled(fitted, score, row):
    """Whether scikit-learn itself contradicts its answer to one row: then nobody knows what is right.

    It does where rounding decides: products of matrices round differently in blocks of rows, and the cosine of 1e30
    is another for the next float64.
    """
    answers = []
    for count in (1, 2, 7, 40, -1):
        repeated = _moved(row) if count < 0 else part_of(row, np.zeros(count, int))
        predicted, scores = _asked(fitted, score, repeated)
        answers.append(predicted[-1] if scores is None else scores[-1])
    if answers[0].dtype.kind != "f":
        return any((answers[0] != other).any() for other in answers[1:])
    return any(_apart(answers[0], other) or _apart(other, answers[0]) for other in answers[1:])


def _moved(row):
    """The row with each huge number replaced by the next float64."""
    moved = row.copy()
    for j in numbers_of(row):
        cell = (0, j)
        value = float(moved.iloc[cell] if hasattr(moved, "iloc") else moved[cell])
        if 1e15 <= abs(value) < math.inf:
            if hasattr(moved, "iloc"):
                moved[moved.columns[j]] = [np.nextafter(value, 0.0)]
            else:
                moved[cell] = np.nextafter(value, 0.0)
    return moved


def _only_one_infinity(rows_, i):
    """A column takes infinities or does not; pipelines that take one of the two are not asked about it."""
    row = [v for v in np.asarray(part_of(rows_, np.array([i])), object).ravel() if isinstance(v, float)]
    return any(math.isinf(v) for v in row)


def _row(rows_, i):
    return np.asarray(part_of(rows_, np.array([i])), object).ravel().tolist()


def _given(runtime, rows_):
    answer = runtime.predict(rows_)
    score = np.asarray(answer.score).reshape(len(rows_), -1)
    label = None if answer.label is None else np.asarray(answer.label).reshape(len(rows_), -1)
    return label, score


def _threshold(fitted):
    """What a classifier compares its positive class's score with, where that is not a half or 0."""
    while hasattr(fitted, "steps") or hasattr(fitted, "best_estimator_"):
        fitted = fitted.steps[-1][1] if hasattr(fitted, "steps") else fitted.best_estimator_
    found = getattr(fitted, "best_threshold_", getattr(fitted, "threshold", None))
    return found if isinstance(found, float) else None


def _differs(manifest, predicted, scores, answer, limit):
    """What is wrong with one row's answer (labels, scores); nothing when it agrees."""
    label, score = answer
    if manifest.task == "regressor":
        return _apart(score, predicted.astype(np.float64))
    if scores is not None and (problem := _apart(score, scores)):
        return problem
    unsure = np.zeros(len(predicted), bool)
    if scores is not None:
        unsure = undecided(manifest.score, manifest.outputs, scores[None, :])[0] | np.isnan(scores).any()
        if limit is not None:
            unsure |= bool((np.abs(np.abs(scores) - abs(limit)) <= TOLERANCE).any())
    elif manifest.score == "negative_distance":
        unsure = undecided(manifest.score, manifest.outputs, score[None, :].astype(np.float64))[0]
    for k, (want, found) in enumerate(zip(predicted.tolist(), label.tolist(), strict=True)):
        if not unsure[k] and (want != found or type(want) is not type(found)):
            return f"label {found!r} for {want!r}; scores {score} for {scores}"
    return ""


def _apart(found, wanted):
    if found.shape != wanted.shape:
        return f"scores have shape {found.shape}, not {wanted.shape}"
    with np.errstate(all="ignore"):
        same = (found == wanted.astype(np.float32)) | (np.isnan(found) & np.isnan(wanted))
        close = np.abs(found - wanted) <= TOLERANCE * np.maximum(1.0, np.abs(wanted))
    good = same | (close & np.isfinite(wanted) & np.isfinite(found))
    return "" if good.all() else f"scores {found} for {wanted}"


def _batches(runtime, rows_, given):
    """One row alone must be answered as it is in company."""
    for i in list(given)[:: max(1, len(given) // 12)]:
        _, score = _given(runtime, part_of(rows_, np.array([i])))
        if _apart(score[0], given[i][1].astype(np.float64)):
            return f"row {i} {_row(rows_, i)}: alone {score[0]}, in company {given[i][1]}"
    return ""


def _empty(runtime, rows_):
    score = runtime.predict(part_of(rows_, np.arange(0))).score
    wanted = (0, _given(runtime, part_of(rows_, np.arange(1)))[1].shape[1])
    return "" if score.shape == wanted else f"no rows give scores of shape {score.shape}, not {wanted}"
