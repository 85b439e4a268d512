"""Clusterers and centroids: the nearest of some points wins.

scikit-learn expands the square, ||x||² - 2 x·c + ||c||², and which terms it adds, in which order, decides who wins far
from the centres: KMeans leaves ||x||² out and still tells them apart where the others see a tie and take the first.
"""

# ruff: noqa: SLF001 - what a fitted estimator learned is partly private to it
from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.cluster import AffinityPropagation, Birch, BisectingKMeans, KMeans, MeanShift, MiniBatchKMeans
from sklearn.covariance import EllipticEnvelope
from sklearn.neighbors import NearestCentroid
from sklearn.utils.extmath import row_norms

from converters.lowering.bayes import discriminant_probabilities, one_sided
from converters.lowering.graph import Lowering, Value, Wide
from converters.lowering.rules import rule

_CENTRED = (KMeans, MiniBatchKMeans, BisectingKMeans)
_NEAREST = (MeanShift, AffinityPropagation)


def expanded_squares(g: Lowering, x: Value, centres: Wide) -> Value:
    """(n, K) squared Euclidean distances as `euclidean_distances` has them: (-2 x·c + ||x||²) + ||c||², or 0."""
    norms = g.memo((x.name, "row norms"), lambda: g.reduce("Sum", g.mul(x, x)))
    made = g.add(g.add(g.matmul(x, -2.0 * centres.T), norms), row_norms(centres, squared=True))
    return g.where(g.binary("Less", made, 0.0), 0.0, made)


def expanded_distances(g: Lowering, x: Value, centres: Wide) -> Value:
    """(n, K): the roots of `expanded_squares`."""
    return g.unary("Sqrt", expanded_squares(g, x, centres))


def offset_squares(g: Lowering, x: Value, centres: Wide) -> Value:
    """(n, K) squared distances less ||x||², which the order does not need: ||c||² - 2 x·c."""
    return g.matmul(x, -2.0 * centres.T, row_norms(centres, squared=True))


def _centres(g: Lowering, fitted: Any) -> Wide:
    found = (
        fitted.subcluster_centers_ if isinstance(fitted, Birch) else getattr(fitted, "cluster_centers_", None)
    )
    if found is None or not len(found):
        raise g.refuse(
            fitted, "has no cluster centres", "fit it until it converges, on rows instead of affinities"
        )
    return np.ascontiguousarray(found, np.float64)


def _wide(g: Lowering, fitted: Any) -> None:
    if fitted.cluster_centers_.dtype != np.float64:
        raise g.refuse(
            fitted, "was fitted on float32 rows and predicts no float64 ones", "fit it on float64 rows"
        )


@rule("predict", KMeans, MiniBatchKMeans)
def _kmeans(g: Lowering, fitted: Any, x: Value) -> Value:
    _wide(g, fitted)
    return g.argmin(offset_squares(g, x, _centres(g, fitted)))


@rule("transform", *_CENTRED, Birch)
def _distances(g: Lowering, fitted: Any, x: Value) -> Value:
    return expanded_distances(g, x, _centres(g, fitted))


@rule("negative_distance", *_CENTRED, *_NEAREST, Birch)
def _negative_distance(g: Lowering, fitted: Any, x: Value) -> Value:
    return g.unary("Neg", expanded_distances(g, x, _centres(g, fitted)))


@rule("predict", *_NEAREST)
def _nearest(g: Lowering, fitted: Any, x: Value) -> Value:
    return g.argmin(expanded_squares(g, x, _centres(g, fitted)))


@rule("predict", Birch)
def _birch(g: Lowering, fitted: Birch, x: Value) -> Value:
    nearest = g.argmin(expanded_squares(g, x, _centres(g, fitted)))
    return g.take(np.asarray(fitted.subcluster_labels_, np.int64), nearest)


@rule("predict", BisectingKMeans)
def _bisecting(g: Lowering, fitted: BisectingKMeans, x: Value) -> Value:
    """Every split is decided at once; the leaf whose whole path agrees is the answer."""
    _wide(g, fitted)
    left: list[Wide] = []
    right: list[Wide] = []
    paths: list[tuple[dict[int, float], int]] = []
    pending: list[tuple[Any, dict[int, float]]] = [(fitted._bisecting_tree, {})]
    while pending:
        node, path = pending.pop()
        if node.left is None:
            paths.append((path, int(node.label)))
            continue
        split = len(left)
        left.append(node.left.center)
        right.append(node.right.center)
        pending += [(node.left, {**path, split: -1.0}), (node.right, {**path, split: 1.0})]
    if not left:
        return g.argmin(offset_squares(g, x, _centres(g, fitted)))
    shift = getattr(fitted, "_X_mean", 0.0)
    near, far = (offset_squares(g, x, np.asarray(side, np.float64) + shift) for side in (left, right))
    turns = g.where(g.binary("Less", far, near), np.array([1.0]), np.array([-1.0]))
    agreement = np.zeros((len(left), len(paths)))
    for leaf, (path, _) in enumerate(paths):
        agreement[list(path), leaf] = list(path.values())
    depth = np.array([-float(len(path)) for path, _ in paths])
    return g.take(np.array([label for _, label in paths]), g.argmax(g.matmul(turns, agreement, depth)))


# --- centroids of classes -----------------------------------------------------------------------------------------


@rule("predict", NearestCentroid)
def _centroid_label(g: Lowering, fitted: NearestCentroid, x: Value) -> Value:
    if not np.isclose(fitted.class_prior_, 1 / len(fitted.classes_)).all():
        return g.argmax(g.call(fitted, "log_density", x))
    centroids = np.ascontiguousarray(fitted.centroids_, np.float64)
    if fitted.metric == "euclidean":
        return g.argmin(expanded_squares(g, x, centroids))
    return g.argmin(_manhattan(g, fitted, x, centroids))


@rule("log_density", NearestCentroid)
def _centroid_scores(g: Lowering, fitted: NearestCentroid, x: Value) -> Value:
    spread = np.where(fitted.within_class_std_dev_ != 0, fitted.within_class_std_dev_, 1.0)
    scaled = g.div(x, spread)
    centroids = np.asarray(fitted.centroids_, np.float64) / spread
    if fitted.metric == "euclidean":
        distances = expanded_distances(g, scaled, centroids)
    else:
        distances = _manhattan(g, fitted, scaled, centroids)
    with np.errstate(divide="ignore"):
        prior = 2.0 * np.log(fitted.class_prior_)
    return g.add(g.unary("Neg", g.mul(distances, distances)), prior)


def _manhattan(g: Lowering, fitted: NearestCentroid, x: Value, centroids: Wide) -> Value:
    if fitted.metric != "manhattan":
        raise g.refuse(fitted, f"has the metric {fitted.metric!r}", "use metric='euclidean' or 'manhattan'")
    apart = g.unary("Abs", g.sub(g.reshape(x, (-1, 1, x.width)), centroids[None]))
    return g.reduce("Sum", apart, axis=2, keepdims=False)


@rule("decision_function", NearestCentroid)
def _centroid_decision(g: Lowering, fitted: NearestCentroid, x: Value) -> Value:
    return one_sided(g, g.call(fitted, "log_density", x))


@rule("predict_proba", NearestCentroid)
def _centroid_probabilities(g: Lowering, fitted: NearestCentroid, x: Value) -> Value:
    return discriminant_probabilities(g, g.call(fitted, "log_density", x))


# --- an ellipsoid around the inliers ------------------------------------------------------------------------------


@rule("score_samples", EllipticEnvelope)
def _elliptic_score(g: Lowering, fitted: EllipticEnvelope, x: Value) -> Value:
    apart = g.sub(x, fitted.location_)
    distance = g.unary("Sqrt", g.reduce("Sum", g.mul(g.matmul(apart, fitted.get_precision()), apart)))
    return g.unary("Neg", g.mul(distance, distance))


@rule("decision_function", EllipticEnvelope)
def _elliptic_decision(g: Lowering, fitted: EllipticEnvelope, x: Value) -> Value:
    return g.sub(g.call(fitted, "score_samples", x), float(fitted.offset_))


@rule("predict", EllipticEnvelope)
def _elliptic_label(g: Lowering, fitted: EllipticEnvelope, x: Value) -> Value:
    decision = g.call(fitted, "decision_function", x)
    return g.cast(g.vector(g.binary("GreaterOrEqual", decision, 0.0)), "int64")
