"""Every estimator of scikit-learn that predicts or transforms: does it convert and pass, and if not, why?

``python -m tests.parity.coverage`` writes docs/reference/coverage.md; a test compares the page with a fresh run.
"""

import inspect
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from sklearn.base import ClassifierMixin, ClusterMixin, OutlierMixin, RegressorMixin, TransformerMixin
from sklearn.datasets import make_classification
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeRegressor
from sklearn.utils import all_estimators

from converters import convert
from edge_runtime.contract.errors import ParityError, UnsupportedPipeline

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "coverage.md"
MIXINS = {
    "classifier": ClassifierMixin,
    "regressor": RegressorMixin,
    "outlier_detector": OutlierMixin,
    "cluster": ClusterMixin,
}
PROBES = 800
# What cannot be fitted without being told more.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ClassifierChain": {"estimator": LogisticRegression()},
    "FixedThresholdClassifier": {"estimator": LogisticRegression()},
    "GridSearchCV": {"estimator": LogisticRegression(), "param_grid": {"C": [0.1, 1.0]}},
    "HalvingGridSearchCV": {"estimator": LogisticRegression(), "param_grid": {"C": [0.1, 1.0]}},
    "LocalOutlierFactor": {"novelty": True},
    "MultiOutputClassifier": {"estimator": LogisticRegression()},
    "MultiOutputRegressor": {"estimator": Ridge()},
    "OneVsOneClassifier": {"estimator": LogisticRegression()},
    "OneVsRestClassifier": {"estimator": LogisticRegression()},
    "OutputCodeClassifier": {"estimator": LogisticRegression(), "random_state": 0},
    "RegressorChain": {"estimator": Ridge()},
    "SelfTrainingClassifier": {"estimator": LogisticRegression()},
    "StackingClassifier": {"estimators": [("a", LogisticRegression()), ("b", LogisticRegression(C=0.1))]},
    "StackingRegressor": {"estimators": [("a", Ridge()), ("b", DecisionTreeRegressor(max_depth=3))]},
    "TunedThresholdClassifierCV": {"estimator": LogisticRegression()},
    "VotingClassifier": {"estimators": [("a", LogisticRegression()), ("b", LogisticRegression(C=0.1))]},
    "VotingRegressor": {"estimators": [("a", Ridge()), ("b", DecisionTreeRegressor(max_depth=3))]},
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one estimator: ``state`` is ``proven``, ``refused`` or ``not fitted``."""

    kind: str
    name: str
    state: str
    detail: str


# The same for transformers, and fewer rounds where these would take long.
TRANSFORMER_ARGUMENTS: dict[str, dict[str, Any]] = {
    "ColumnTransformer": {"transformers": [("a", StandardScaler(), [0, 1, 2]), ("b", "passthrough", [3, 4])]},
    "DictionaryLearning": {"max_iter": 5},
    "FeatureHasher": {"n_features": 16},
    "FeatureUnion": {"transformer_list": [("a", StandardScaler()), ("b", PCA(2, random_state=0))]},
    "GaussianRandomProjection": {"n_components": 3, "random_state": 0},
    "HashingVectorizer": {"n_features": 16},
    "LatentDirichletAllocation": {"max_iter": 2},
    "MiniBatchDictionaryLearning": {"max_iter": 5},
    "MissingIndicator": {"features": "all"},
    "RandomTreesEmbedding": {"n_estimators": 10, "random_state": 0},
    "RFE": {"estimator": Ridge(), "n_features_to_select": 3},
    "RFECV": {"estimator": Ridge()},
    "SelectFromModel": {"estimator": Ridge()},
    "SelectKBest": {"k": 3},
    "SequentialFeatureSelector": {"estimator": Ridge(), "n_features_to_select": 2},
    "SparseCoder": {"dictionary": np.eye(5)},
    "SparseRandomProjection": {"n_components": 3, "random_state": 0},
    "StackingRegressor": ARGUMENTS["StackingRegressor"],
    "StackingClassifier": ARGUMENTS["StackingClassifier"],
    "VotingClassifier": ARGUMENTS["VotingClassifier"],
    "VotingRegressor": ARGUMENTS["VotingRegressor"],
}
POSITIVE = (
    "AdditiveChi2Sampler",
    "LatentDirichletAllocation",
    "MiniBatchNMF",
    "NMF",
    "SkewedChi2Sampler",
    "TfidfTransformer",
)
WITH_HOLES = ("KNNImputer", "MissingIndicator", "SimpleImputer")
# Their fit_transform gives the rows and the targets, which a Pipeline does not take; so their fit is called alone.
PAIRED = ("CCA", "PLSCanonical", "PLSRegression", "PLSSVD")
# What scikit-learn itself cannot put before an estimator, and why.
NO_STEP = {
    "IsotonicRegression": "gives a vector, which no step after it takes",
    "LabelBinarizer": "takes labels, not rows",
    "LabelEncoder": "takes labels, not rows",
    "MultiLabelBinarizer": "takes labels, not rows",
    "PatchExtractor": "takes images, not rows",
    "TSNE": "has no transform for new rows",
}
CATEGORICAL = ("OneHotEncoder", "OrdinalEncoder", "TargetEncoder")
TEXT = ("CountVectorizer", "HashingVectorizer", "TfidfVectorizer")
DICTS = ("DictVectorizer", "FeatureHasher")
WORDS = np.array(["run", "walk", "rest"])


def estimators():
    """(kind, name, class) of all that scikit-learn lists with ``predict``, then of all that transforms."""
    every = all_estimators(None)
    for kind in MIXINS:
        for name, made in every:
            if hasattr(made, "predict") and _kind(made) == kind:
                yield kind, name, made
    for name, made in every:
        if issubclass(made, TransformerMixin) or name in TEXT:
            yield "transformer", name, made


def _kind(made):
    return next((kind for kind, mixin in MIXINS.items() if issubclass(made, mixin)), "")


def data():
    """120 rows of 5 columns on scales that differ, three classes."""
    X, y = make_classification(120, 5, n_informative=4, n_redundant=0, n_classes=3, random_state=0)
    return X * [1.0, 0.01, 3.0, 100.0, 1.0] + [0.0, 1.0, -2.0, 50.0, 0.0], y


def fitted(name, made, *, scaled=False):
    """The estimator fitted on `data`, and its rows."""
    X, y = data()
    accepted = inspect.signature(made).parameters
    arguments = dict(ARGUMENTS.get(name, {}))
    if "random_state" in accepted:
        arguments.setdefault("random_state", 0)
    estimator = made(**arguments)
    tags = estimator.__sklearn_tags__()
    regressor = tags.estimator_type == "regressor"
    if tags.input_tags.positive_only or name in ("CategoricalNB", "GammaRegressor", "PoissonRegressor"):
        X = np.abs(X)
    if name == "CategoricalNB":
        X = np.floor(X) % 4
    if name == "IsotonicRegression":
        X = X[:, :1]
    target = X[:, 0] * 2 + np.abs(X[:, -1]) + y if regressor else y
    if regressor and name in ("GammaRegressor", "PoissonRegressor", "TweedieRegressor"):
        target = np.abs(target) + 0.5
    if name == "ClassifierChain":  # its predict_proba takes two classes only
        target = (y > 0).astype(int)
    if name in ("CCA", "PLSCanonical") or (
        tags.target_tags.multi_output and not tags.target_tags.single_output
    ):
        target = np.stack([target, target[::-1]], axis=1)
    if not tags.classifier_tags.multi_class if tags.classifier_tags else False:
        target = (y > 0).astype(int)
    pipeline = make_pipeline(StandardScaler(), estimator) if scaled else estimator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.fit(X, target)
    return pipeline, X


def fitted_before(name, made):
    """The transformer fitted on what it takes, before a logistic regression, and its rows."""
    X, y = data()
    arguments = dict(TRANSFORMER_ARGUMENTS.get(name, {}))
    if "random_state" in inspect.signature(made).parameters:
        arguments.setdefault("random_state", 0)
    if name in POSITIVE:
        X = np.abs(X)
    if name in CATEGORICAL:
        X = np.stack([WORDS[y], np.array(["a", "b", "c", "d"])[np.arange(len(y)) * 7 % 4]], axis=1).astype(
            object
        )
    if name in TEXT:
        X = np.array([" ".join(WORDS[[k, (i + k) % 3]]) for i, k in enumerate(y)], object)
    if name in DICTS:
        X = np.array([{"word": WORDS[k], "size": float(i)} for i, k in enumerate(y)], object)
    if name in WITH_HOLES:
        X[np.random.default_rng(0).random(X.shape) < 0.1] = np.nan
    if name == "KernelCenterer":
        X = X @ X.T
    if name == "IsotonicRegression":
        X = X[:, :1]
    step, last = made(**arguments), LogisticRegression(max_iter=2000)
    pipeline = make_pipeline(step, last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in PAIRED:
            step.fit(X, np.eye(3)[y])
            last.fit(step.transform(X), y)
        else:
            pipeline.fit(X, y)
    return pipeline, X


def outcome(kind, name, made):
    """Fits, converts and judges one estimator; anything but a proof or a refusal is an error and passes through."""
    try:
        pipeline, X = fitted_before(name, made) if kind == "transformer" else fitted(name, made)
    except (ValueError, TypeError, NotImplementedError) as e:
        return Outcome(kind, name, "not fitted", NO_STEP.get(name, _first(e)))
    with tempfile.TemporaryDirectory() as folder:
        try:
            artifact = convert(pipeline, X, Path(folder) / "m.onnx", probes=PROBES)
        except (UnsupportedPipeline, ParityError) as e:
            return Outcome(kind, name, "refused", _first(e))
    return Outcome(kind, name, "proven", "; ".join((*artifact.report.remedies, *artifact.report.notes)))


def _first(error):
    return " ".join(str(error).split())[:200].replace("|", "/")


def page(outcomes):
    """The page as text."""
    lines = [
        "# Which estimators convert",
        "",
        "Made by `python -m tests.parity.coverage`; a test compares it with a fresh run. Each estimator is fitted with",
        f"its defaults on 120 rows of numbers (scikit-learn {sklearn.__version__}) and converted with about",
        f"{PROBES:,} hostile rows. A transformer stands before a logistic regression, on rows that it is made for:",
        "numbers, counts, numbers with holes, categories, text.",
        "*proven* means that every row agreed; *refused* that no file was written; *not fitted* that scikit-learn",
        "itself cannot put it before an estimator.",
    ]
    for kind in (*MIXINS, "transformer"):
        found = [o for o in outcomes if o.kind == kind]
        judged = [o for o in found if o.state != "not fitted"]
        proven = sum(o.state == "proven" for o in judged)
        lines += [
            "",
            f"## {kind.replace('_', ' ').capitalize()}s: {proven} of {len(judged)} proven",
            "",
            "| estimator | state | remarks |",
            "|---|---|---|",
            *(f"| {o.name} | {o.state} | {o.detail} |" for o in found),
        ]
    return "\n".join(lines) + "\n"


def main():
    """Writes the page."""
    PAGE.write_text(page([outcome(*each) for each in estimators()]), encoding="utf-8")


if __name__ == "__main__":
    main()
