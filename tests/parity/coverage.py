"""Every estimator of scikit-learn that predicts, fitted on plain numbers: does it convert and pass, and if not, why?

``python -m tests.parity.coverage`` writes docs/reference/coverage.md; a test compares the page with a fresh run.
"""

import inspect
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sklearn
from sklearn.base import ClassifierMixin, ClusterMixin, OutlierMixin, RegressorMixin
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeRegressor
from sklearn.utils import all_estimators

from converters import convert
from edge_runtime.contract.errors import ParityError, UnsupportedPipeline

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "coverage.md"
KINDS = ("classifier", "regressor", "outlier_detector", "cluster")
PROBES = 800
# What cannot be fitted without being told more.
ARGUMENTS = {
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


def estimators():
    """(kind, name, class) of everything with ``predict`` that scikit-learn lists, without repetition."""
    seen = set()
    for kind in KINDS:
        for name, made in all_estimators(None):
            tags = _kind(made)
            if tags == kind and hasattr(made, "predict") and name not in seen:
                seen.add(name)
                yield kind, name, made


def _kind(made):
    for kind, mixin in zip(KINDS, (ClassifierMixin, RegressorMixin, OutlierMixin, ClusterMixin), strict=True):
        if issubclass(made, mixin):
            return kind
    return ""


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


def outcome(kind, name, made):
    """Fits, converts and judges one estimator; anything but a proof or a refusal is an error and passes through."""
    try:
        pipeline, X = fitted(name, made)
    except (ValueError, TypeError, NotImplementedError) as e:
        return Outcome(kind, name, "not fitted", _first(e))
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
        f"{PROBES:,} hostile rows.",
        "*proven* means that every row agreed; *refused* that no file was written.",
    ]
    for kind in KINDS:
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
