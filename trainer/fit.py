"""From a spec to a fitted pipeline, and how well it does on rows it has not seen."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupShuffleSplit, train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.validation import has_fit_parameter

from converters.ranges import Ranges
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.fields import nearest
from trainer.datasets import LEFT, RIGHT, Table, WatchData, load_csv, load_npz, load_watch
from trainer.spec import REGRESSORS, DeclaredRanges, ModelSpec, TableSource, TrainSpec, WatchSource

_ESTIMATORS: Final[Mapping[str, type]] = {
    "forest": RandomForestClassifier,
    "extra-trees": ExtraTreesClassifier,
    "tree": DecisionTreeClassifier,
    "logistic": LogisticRegression,
    "forest-regressor": RandomForestRegressor,
    "ridge": Ridge,
}
_SCALERS: Final[Mapping[str, type]] = {
    "standard": StandardScaler,
    "minmax": MinMaxScaler,
    "maxabs": MaxAbsScaler,
    "robust": RobustScaler,
}
_SKLEARN_NAMES: Final = {"trees": "n_estimators"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Rows of one kind: ``X`` (n, F) float32, ``y`` (n,), and ``groups`` (n,) text, or None where there are none."""

    X: NDArray[np.float32]
    y: NDArray[Any]
    groups: NDArray[np.str_] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """What to train on, and the named parts to evaluate on, which share no person, device or row with it."""

    training: Rows
    evaluation: tuple[tuple[str, Rows], ...]
    feature_names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """A fitted pipeline with its training rows.

    ``evaluation`` is the `measure` (accuracy, or R² of a regressor) on each named part that was held out; ``ranges`` is
    what `converters.convert` takes.
    """

    pipeline: Pipeline
    training: Rows
    feature_names: tuple[str, ...]
    evaluation: tuple[tuple[str, float], ...]
    measure: str
    ranges: Ranges | None


def fit(spec: TrainSpec) -> Fitted:
    """Fits and evaluates; raises `DatasetError` or `ConfigError` when the rows do not allow what the spec asks."""
    split = read_rows(spec)
    ranges = ranges_for(spec, split.feature_names)
    return evaluated(spec, split, ranges, fitted_to(split, make_pipeline(spec.model, spec.seed), spec.name))


def fitted_to(
    split: Split, pipeline: Pipeline, name: str, weights: NDArray[np.float64] | None = None
) -> Pipeline:
    """``pipeline``, fitted to the training rows, the last step with ``weights`` (n,) where they are given.

    Raises `ConfigError` when it cannot be fitted, or when weights are given and its last step takes none.
    """
    step, estimator = pipeline.steps[-1]
    told: dict[str, NDArray[np.float64]] = {}
    if weights is not None:
        if not has_fit_parameter(estimator, "sample_weight"):
            raise ConfigError(
                f"model {name}: {type(estimator).__name__} takes no weights of rows; choose another kind of model, or "
                "fit it without (--reweight off)"
            )
        told[f"{step}__sample_weight"] = weights
    try:
        pipeline.fit(split.training.X, split.training.y, **told)
    except ValueError as e:
        raise ConfigError(f"model {name}: cannot be fitted: {e}") from e
    return pipeline


def evaluated(spec: TrainSpec, split: Split, ranges: Ranges | None, pipeline: Pipeline) -> Fitted:
    """A fitted pipeline with how well it does on each part that was held out; it is told the features' names."""
    evaluation = tuple((name, score(pipeline, rows)) for name, rows in split.evaluation)
    # What scikit-learn notes itself when it is given a data frame: the names travel with the pipeline.
    pipeline[0].feature_names_in_ = np.array(split.feature_names, dtype=object)
    return Fitted(
        pipeline=pipeline,
        training=split.training,
        feature_names=split.feature_names,
        evaluation=evaluation,
        measure=measure_of(spec.model),
        ranges=ranges,
    )


def measure_of(model: ModelSpec) -> str:
    """The name of what `score` gives."""
    return "R²" if model.kind in REGRESSORS else "accuracy"


def score(pipeline: Pipeline, rows: Rows, weights: NDArray[np.float64] | None = None) -> float:
    """Accuracy, or R² of a regressor; each row counts by its weight where ``weights`` (n,) are given."""
    return float(pipeline.score(rows.X, rows.y, sample_weight=weights))


def ranges_for(spec: TrainSpec, feature_names: tuple[str, ...]) -> Ranges | None:
    """The spec's ranges; a name that no column has is refused here, before the pipeline is fitted."""
    if not isinstance(spec.ranges, DeclaredRanges):
        return spec.ranges
    for name, _ in spec.ranges.features:
        if name not in feature_names:
            hint = nearest(name, feature_names)
            raise ConfigError(f"{spec.ranges.where}.{name}: the rows have no feature of that name{hint}")
    return dict(spec.ranges.features)


def make_pipeline(model: ModelSpec, seed: int) -> Pipeline:
    """The unfitted pipeline."""
    estimator = _ESTIMATORS[model.kind]()
    parameters = {_SKLEARN_NAMES.get(name, name): value for name, value in model.parameters}
    if "random_state" in estimator.get_params():
        parameters["random_state"] = seed
    estimator.set_params(**parameters)
    steps: list[tuple[str, Any]] = [("estimator", estimator)]
    if model.scaler != "none":
        steps.insert(0, ("scaler", _SCALERS[model.scaler]()))
    return Pipeline(steps)


def read_rows(spec: TrainSpec) -> Split:
    """The rows of the spec's source, split."""
    match spec.source:
        case WatchSource():
            return _watch(spec.source)
        case TableSource():
            return _table(spec.source, spec)


def _watch(source: WatchSource) -> Split:
    data = load_watch()
    held_out = data.select(people=source.evaluation)
    parts = (
        (f"the {name} wrist", held_out.select(wrists=(wrist,)))
        for wrist, name in ((LEFT, "left"), (RIGHT, "right"))
    )
    return Split(
        training=_watch_rows(data.select(people=source.people, wrists=source.wrists)),
        evaluation=tuple((name, _watch_rows(part)) for name, part in parts),
        feature_names=data.feature_names,
    )


def _watch_rows(data: WatchData) -> Rows:
    return Rows(X=data.features, y=np.asarray(data.label_names)[data.labels], groups=data.groups)


def _table(source: TableSource, spec: TrainSpec) -> Split:
    load = load_csv if source.path.suffix == ".csv" else load_npz
    table = load(source.path, target=source.target, group=source.group)
    rows = Rows(X=table.features, y=_target(table, source, spec.model.kind), groups=table.group)
    held_out = _held_out(rows, source, spec)
    if held_out.all() or not held_out.any():
        raise ConfigError(
            f"{source.path}: {int(held_out.sum())} of {len(held_out)} rows would be held out: nothing is left to train "
            "or to evaluate on"
        )
    return Split(
        training=_take(rows, ~held_out),
        evaluation=(("held-out rows", _take(rows, held_out)),),
        feature_names=table.feature_names,
    )


def _target(table: Table, source: TableSource, kind: str) -> NDArray[Any]:
    """The target column as numbers for a regressor; text of whole numbers only becomes whole numbers."""
    if kind in REGRESSORS:
        try:
            return table.target.astype(np.float64)
        except ValueError as e:
            raise ConfigError(
                f"{source.path}: {source.target!r} is not numeric ({e}): {kind} needs numbers"
            ) from e
    if table.target.dtype.kind == "U":
        try:
            return table.target.astype(np.int64)
        except ValueError:
            return table.target
    return table.target


def _held_out(rows: Rows, source: TableSource, spec: TrainSpec) -> NDArray[np.bool_]:
    if rows.groups is not None and source.groups:
        absent = sorted(set(source.groups) - set(rows.groups.tolist()))
        if absent:
            raise ConfigError(f"{source.path}: no row belongs to {source.group} {absent[0]!r}")
        return np.isin(rows.groups, source.groups)
    index = np.arange(len(rows.y))
    try:
        if rows.groups is not None:
            splitter = GroupShuffleSplit(1, test_size=source.fraction, random_state=spec.seed)
            test = next(splitter.split(rows.X, rows.y, rows.groups))[1]
        else:
            stratify = None if spec.model.kind in REGRESSORS else rows.y
            test = train_test_split(
                index, test_size=source.fraction, random_state=spec.seed, stratify=stratify
            )[1]
    except ValueError as e:
        raise ConfigError(f"{source.path}: cannot hold out {source.fraction:g} of the rows: {e}") from e
    return np.isin(index, test)


def _take(rows: Rows, mask: NDArray[np.bool_]) -> Rows:
    groups = None if rows.groups is None else rows.groups[mask]
    return Rows(X=rows.X[mask], y=rows.y[mask], groups=groups)
