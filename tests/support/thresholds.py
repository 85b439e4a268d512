"""Hostile rows for trees, made from scikit-learn's own structures without a line of the converters.

A split is found in `tree_` or `_predictors`, a training row that reaches it by walking the tree, and the raw value
where the pipeline changes its mind by bisection over all floats in order, with its own transform as the judge.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn import config_context
from sklearn.pipeline import Pipeline

OFFSETS = np.arange(
    -2, 4
)  # from two values below the last one that goes left to two above the first that goes right
TRIES = 8
_SIGNED = {"float32": np.int32, "float64": np.int64}


@dataclass(frozen=True, slots=True, eq=False)
class Splits:
    """Arrays over S splits: the column, the threshold behind the scalers, and `TRIES` training rows that come by."""

    column: np.ndarray
    threshold: np.ndarray
    base: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Edges:
    """Arrays over E raw edges: `TRIES` training rows, the column, and the place of the last value on one side."""

    base: np.ndarray
    column: np.ndarray
    place: np.ndarray


def place_of(values):
    """Floats in order as whole numbers, neighbours one apart; both zeros are 0."""
    magnitude = np.abs(values).view(_SIGNED[values.dtype.name]).astype(np.int64)
    return np.where(values < 0, -magnitude, magnitude)


def value_at(places, dtype):
    """The floats that `place_of` gives these places; those beyond the last finite one are that one."""
    top = int(np.array(np.finfo(dtype).max, dtype).view(_SIGNED[dtype]))
    magnitude = np.minimum(np.abs(places), top).astype(_SIGNED[dtype]).view(dtype)
    return np.where(places < 0, -magnitude, magnitude)


def before(pipeline, rows):
    """What the last step of a pipeline gets to see of ``rows``, in float64; infinite where a step would refuse one."""
    wide = rows.astype(np.float64)
    if not isinstance(pipeline, Pipeline):
        return wide
    with warnings.catch_warnings(), np.errstate(all="ignore"), config_context(assume_finite=True):
        warnings.simplefilter("ignore")
        return np.asarray(pipeline[:-1].transform(wide))


def last(pipeline):
    """The model at the end of a pipeline, or the model alone."""
    return pipeline[-1] if isinstance(pipeline, Pipeline) else pipeline


def narrows(model):
    """Whether the model casts what it gets to float32 before it compares: all trees but histogram-based ones."""
    return not hasattr(model, "_predictors")


def splits_of(pipeline, rows, rng, given=None):
    """The splits over numbers that some of the training ``rows`` (n, F) reach, and each category as two of them.

    ``given`` are the rows as the pipeline takes them, where these are not numbers.
    """
    model = last(pipeline)
    seen = before(pipeline, rows)
    found = []
    if narrows(model):
        with np.errstate(over="ignore"):
            seen = seen.astype(np.float32)
    elif model._preprocessor is not None:
        if given is None:
            found += _at_categories(model, len(rows), rng)
        seen = model._preprocess_X(seen if given is None else given, reset=False)
    found += [walk for tree in _trees(model) for walk in _walked(tree, seen, rng)]
    column, threshold, base = (np.array(each) for each in zip(*found, strict=True))
    return Splits(column.astype(np.int64), threshold.astype(np.float64), base.astype(np.int64))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tree:
    """Arrays over the nodes; ``feature`` is a column of what the tree sees, ``column`` of what its model sees.

    ``sets`` holds, where a node splits categories, those that go left.
    """

    feature: np.ndarray
    column: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray
    missing_left: np.ndarray
    inner: np.ndarray
    sets: dict[int, np.ndarray]


def _trees(model):
    if hasattr(model, "_predictors"):
        yield from (_histogram_tree(model, each) for stage in model._predictors for each in stage)
        return
    members = np.ravel(model.estimators_) if hasattr(model, "estimators_") else [model]
    for i, member in enumerate(members):
        tree = member.tree_
        inner = tree.children_left >= 0
        feature = np.where(inner, tree.feature, 0)
        if hasattr(model, "estimators_features_"):
            feature = np.asarray(model.estimators_features_[i])[feature]
        yield _Tree(
            feature=feature,
            column=feature,
            threshold=tree.threshold,
            left=tree.children_left,
            right=tree.children_right,
            missing_left=tree.missing_go_to_left.astype(bool),
            inner=inner,
            sets={},
        )


def _histogram_tree(model, predictor):
    nodes = predictor.nodes
    order = np.arange(model.n_features_in_)
    if model._preprocessor is not None:  # what the trees see has the categories first
        order = np.r_[np.flatnonzero(model.is_categorical_), np.flatnonzero(~model.is_categorical_)]
    inner = nodes["is_leaf"] == 0
    feature = np.where(inner, nodes["feature_idx"], 0).astype(np.int64)
    words = predictor.raw_left_cat_bitsets
    sets = {}
    for node in np.flatnonzero(inner & (nodes["is_categorical"] == 1)):
        bits = words[nodes["bitset_idx"][node]]
        sets[int(node)] = np.array([code for code in range(256) if int(bits[code // 32]) >> code % 32 & 1])
    return _Tree(
        feature=feature,
        column=order[feature],
        threshold=nodes["num_threshold"],
        left=nodes["left"].astype(np.int64),
        right=nodes["right"].astype(np.int64),
        missing_left=nodes["missing_go_to_left"].astype(bool),
        inner=inner,
        sets=sets,
    )


def _walked(tree, seen, rng):
    """(column, threshold, rows that come by) of every split over numbers, from the root down."""
    todo = [(0, np.arange(len(seen)))]
    while todo:
        node, rows = todo.pop()
        if not tree.inner[node] or not len(rows):
            continue
        values = seen[rows, tree.feature[node]]
        if node in tree.sets:
            below = np.isin(values, tree.sets[node])
        else:
            below = values <= tree.threshold[node]
            if np.isfinite(tree.threshold[node]):
                yield tree.column[node], tree.threshold[node], rows[rng.integers(len(rows), size=TRIES)]
        left = np.where(np.isnan(values), tree.missing_left[node], below)
        todo += [(int(tree.left[node]), rows[left]), (int(tree.right[node]), rows[~left])]


def _at_categories(model, count, rng):
    """Each category as the edge below it and the edge above it, on any row."""
    encoder = model._preprocessor.named_transformers_["encoder"]
    for column, known in zip(np.flatnonzero(model.is_categorical_), encoder.categories_, strict=True):
        for code in known[~np.isnan(known)]:
            for threshold in (np.nextafter(code, -np.inf), code):
                yield column, threshold, rng.integers(count, size=TRIES)


def edges_of(pipeline, splits, rows):
    """Where along its column each split changes its mind, the others held as in a training row that reaches it.

    ``rows`` (n, F) have the dtype that the artifact reads; the steps before the model work column by column. Splits
    that no value of the column moves have no edge.
    """
    model = last(pipeline)
    dtype = rows.dtype.name
    base = rows[splits.base[:, 0]]
    each = np.arange(len(base))

    def goes_left(places):
        trial = base.copy()
        trial[each, splits.column] = value_at(places, dtype)
        with np.errstate(all="ignore"):
            made = before(pipeline, trial)[each, splits.column]
            return (made.astype(np.float32) if narrows(model) else made) <= splits.threshold

    top = int(place_of(np.array([np.finfo(dtype).max], dtype))[0])
    low, high = np.full(len(base), -top), np.full(len(base), top)
    first = goes_left(low)
    moves = first != goes_left(high)
    while ((low + 1 < high) & moves).any():
        middle = low // 2 + high // 2 + (low % 2 + high % 2) // 2
        same = goes_left(middle) == first
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return Edges(splits.base[moves], splits.column[moves], low[moves])


def at_edges(rows, edges, start, count):
    """``count`` training rows that reach a split, moved to a value beside it; edges in turn, from the ``start``-th.

    Each round over all edges has the next of `OFFSETS`, and after all of those the next training row.
    """
    turn, at = np.divmod(np.arange(start, start + count), len(edges.base))
    step, offset = np.divmod(turn, len(OFFSETS))
    made = rows[edges.base[at, step % TRIES]]
    made[np.arange(count), edges.column[at]] = value_at(edges.place[at] + OFFSETS[offset], rows.dtype.name)
    return made


def on_a_lattice(rows, edges, count, rng):
    """``count`` rows with about half of their columns beside an edge of that column."""
    made = rows[rng.integers(len(rows), size=count)].copy()
    for j in range(rows.shape[1]):
        places = edges.place[edges.column == j]
        if len(places):
            drawn = rng.choice(places, size=count) + rng.choice(OFFSETS, size=count)
            made[:, j] = np.where(rng.random(count) < 0.5, value_at(drawn, rows.dtype.name), made[:, j])
    return made


def extremes(dtype):
    """Values at the ends of what a float holds, around zero, and whole numbers."""
    kind = np.finfo(dtype)
    tiny, small, top = float(kind.smallest_subnormal), float(kind.smallest_normal), float(kind.max)
    ends = [
        0.0,
        tiny,
        2 * tiny,
        small,
        small - tiny,
        1e-30,
        1.0,
        2.0,
        255.0,
        2.0**24,
        1e12,
        1e30,
        top / 2,
        top,
    ]
    return np.array([*ends, *(-value for value in ends)], dtype)


def wild(rows, count, rng, *, missing, infinite):
    """``count`` rows: training rows, in part far outside, whole, extreme, missing or infinite, in equal shares."""
    made = rows[rng.integers(len(rows), size=count)].copy()
    kind = rng.integers(6, size=count)
    spread = np.nanstd(rows.astype(np.float64), axis=0)
    drawn = np.nanmean(rows, axis=0, dtype=np.float64) + spread * rng.normal(0, 3, made.shape)
    made = np.where((kind == 0)[:, None], drawn.astype(rows.dtype), made)
    made = np.where((kind == 1)[:, None], np.rint(made), made)
    chosen = rng.random(made.shape) < rng.random((count, 1))
    values = extremes(rows.dtype.name)
    made = np.where((kind == 2)[:, None] & chosen, rng.choice(values, size=made.shape), made)
    if infinite.any():
        signs = np.where(rng.random(made.shape) < 0.5, -np.inf, np.inf).astype(rows.dtype)
        made = np.where((kind == 3)[:, None] & chosen & infinite, signs, made)
    if missing.any():
        made = np.where((kind >= 4)[:, None] & chosen & missing, np.nan, made)
    return made.astype(rows.dtype)
