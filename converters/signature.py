"""What a fitted pipeline takes and gives: its columns, task, classes and score."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sklearn.base import is_classifier, is_clusterer, is_outlier_detector, is_regressor
from sklearn.exceptions import NotFittedError
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.isotonic import IsotonicRegression
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from edge_runtime.contract.errors import UnsupportedPipeline
from edge_runtime.contract.manifest import Label

Task = Literal["classifier", "regressor", "clusterer", "outlier_detector"]
Score = Literal["predict_proba", "decision_function", "predict", "negative_distance"]
OUTLIER_LABELS = (-1, 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Signature:
    """What a pipeline answers.

    Attributes:
        pipeline: the fitted object itself, whose answers are the reference.
        task: what it does.
        score: the method that the score stands for. ``negative_distance`` is minus the distance to each centre of
            a clusterer; a classifier's ``predict`` is 1 for the predicted class and 0 for the others.
        width: F, how many columns it takes.
        names: the column names it was fitted with; empty when it was fitted without.
        labels: for each output that has classes, its labels in the order of its indices, as Python values; empty for
            a regressor.
    """

    pipeline: Any
    task: Task
    score: Score
    width: int
    names: tuple[str, ...]
    labels: tuple[tuple[Label, ...], ...]

    @property
    def single(self) -> tuple[Label, ...]:
        """The labels of the only output; empty for a regressor and for several outputs."""
        return self.labels[0] if len(self.labels) == 1 else ()


def read(pipeline: Any) -> Signature:
    """Reads a fitted pipeline or bare estimator.

    Raises `UnsupportedPipeline` for what is not fitted, predicts nothing, or has labels that cannot be written down.
    """
    last = final(pipeline)
    _check_fitted(pipeline)
    if not hasattr(pipeline, "predict"):
        what = f"the last step {last!r}" if last is None or isinstance(last, str) else type(last).__name__
        raise UnsupportedPipeline(
            f"{what} has no predict; the pipeline must end in a classifier, regressor, clusterer or outlier detector"
        )
    task = _task(last)
    labels: tuple[tuple[Label, ...], ...] = ()
    if task == "classifier":
        labels = _labels(last)
    elif task == "outlier_detector":
        labels = (OUTLIER_LABELS,)
    elif task == "clusterer":
        labels = (tuple(range(_clusters(last))),)
    return Signature(
        pipeline=pipeline,
        task=task,
        score=_score(pipeline, last, task),
        width=_width(pipeline),
        names=tuple(str(name) for name in getattr(_first(pipeline), "feature_names_in_", ())),
        labels=labels,
    )


def final(fitted: Any) -> Any:
    """The estimator at the end of nested pipelines and searches."""
    while True:
        if isinstance(fitted, Pipeline):
            if not fitted.steps:
                raise UnsupportedPipeline(
                    "the pipeline has no steps; it must end in an estimator with predict"
                )
            fitted = fitted.steps[-1][1]
        elif hasattr(fitted, "best_estimator_"):
            fitted = fitted.best_estimator_
        else:
            return fitted


@contextmanager
def by_position() -> Iterator[None]:
    """Lets arrays be passed to objects fitted on a data frame, and lets values overflow on their way to float32."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def _check_fitted(pipeline: Any) -> None:
    steps = pipeline.steps if isinstance(pipeline, Pipeline) else [("", pipeline)]
    for name, step in steps:
        if step is None or isinstance(step, str):
            continue
        if isinstance(step, Pipeline):
            _check_fitted(step)
            continue
        kind = f"the class {step.__name__}" if isinstance(step, type) else type(step).__name__
        where = f"step {name!r} ({kind})" if name else kind
        try:
            check_is_fitted(step)
        except NotFittedError as e:
            raise UnsupportedPipeline(f"{where} is not fitted; call pipeline.fit(X, y) first") from e
        except (AttributeError, TypeError) as e:
            raise UnsupportedPipeline(
                f"{where} is not an estimator of scikit-learn; pass a fitted pipeline of its own estimators"
            ) from e


def _task(last: Any) -> Task:
    if is_classifier(last):
        return "classifier"
    if is_regressor(last) or hasattr(last, "transformer_"):
        return "regressor"
    if is_outlier_detector(last):
        return "outlier_detector"
    if is_clusterer(last) or hasattr(last, "predict_proba"):
        return "clusterer"
    return "regressor"


def _score(pipeline: Any, last: Any, task: Task) -> Score:
    if task == "regressor":
        return "predict"
    if hasattr(pipeline, "predict_proba") and not _votes_in_pairs(last):
        return "predict_proba"
    if task == "clusterer":
        centred = hasattr(last, "transform") or hasattr(last, "cluster_centers_")
        return "negative_distance" if centred else "predict"
    return "decision_function" if hasattr(pipeline, "decision_function") else "predict"


def _votes_in_pairs(last: Any) -> bool:
    """A Gaussian process of one model per pair of classes has a predict_proba that only raises."""
    pairs = isinstance(last, GaussianProcessClassifier) and last.multi_class == "one_vs_one"
    return pairs and len(last.classes_) > 2


def _first(fitted: Any) -> Any:
    """The first step of nested pipelines that does something: the others do not say what they take."""
    while isinstance(fitted, Pipeline):
        done = (step for _, step in fitted.steps if step is not None and not isinstance(step, str))
        fitted = next(done)
    return fitted


def _width(pipeline: Any) -> int:
    first = _first(pipeline)
    try:
        return int(first.n_features_in_)
    except AttributeError as e:
        if isinstance(first, IsotonicRegression):
            return 1
        if _takes_no_table(first):
            raise UnsupportedPipeline(
                f"{type(first).__name__} takes text or dictionaries, and devices send rows of numbers and categories; "
                "do this step before the pipeline and convert what follows it"
            ) from e
        raise UnsupportedPipeline(
            f"{type(first).__name__} does not say how many columns it takes (n_features_in_); "
            "put a step that does before it, such as a scaler"
        ) from e


def _takes_no_table(first: Any) -> bool:
    tags = getattr(first, "__sklearn_tags__", None)
    return tags is not None and not tags().input_tags.two_d_array


def _clusters(last: Any) -> int:
    for name in ("cluster_centers_", "means_"):
        if hasattr(last, name) and not hasattr(last, "subcluster_labels_"):
            return max(1, len(getattr(last, name)))
    if hasattr(last, "subcluster_labels_"):
        return int(np.max(last.subcluster_labels_)) + 1
    raise UnsupportedPipeline(
        f"{type(last).__name__} does not say how many clusters it has; use KMeans or a mixture"
    )


def _labels(last: Any) -> tuple[tuple[Label, ...], ...]:
    classes = getattr(last, "classes_", None)
    if classes is None:
        raise UnsupportedPipeline(f"{type(last).__name__} has no classes_; fit it first")
    if isinstance(classes, list):
        return tuple(_plain(last, each) for each in classes)
    binarizer = getattr(last, "_label_binarizer", None)
    if getattr(last, "multilabel_", False) or str(getattr(binarizer, "y_type_", "")).startswith("multilabel"):
        return ((0, 1),) * len(classes)
    return (_plain(last, classes),)


def _plain(last: Any, classes: Any) -> tuple[Label, ...]:
    kind = type(last).__name__
    found: list[Label] = []
    for value in np.asarray(classes):
        plain = value.item() if isinstance(value, np.generic) else value
        if not isinstance(plain, bool | int | float | str):
            raise UnsupportedPipeline(
                f"{kind} has the class label {plain!r} of type {type(plain).__name__}; "
                "use text, whole numbers or truth values as labels"
            )
        found.append(plain)
    if not found:
        raise UnsupportedPipeline(f"{kind} has no classes; fit on labelled rows")
    return tuple(found)
