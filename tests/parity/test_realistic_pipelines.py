"""Pipelines as people write them, on the data sets that come with scikit-learn: proven, or refused for a known reason.

Every proven one is also held against its pipeline on rows that the proof did not choose (`tests.support.hostile`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import datasets
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import Birch, KMeans
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor, make_column_selector
from sklearn.covariance import EllipticEnvelope
from sklearn.cross_decomposition import PLSRegression
from sklearn.decomposition import PCA, FastICA, KernelPCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingRegressor,
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
    RandomTreesEmbedding,
    StackingClassifier,
    StackingRegressor,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.feature_selection import (
    RFECV,
    SelectFromModel,
    SelectKBest,
    SequentialFeatureSelector,
    VarianceThreshold,
    f_classif,
    mutual_info_classif,
)
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.impute import SimpleImputer
from sklearn.isotonic import IsotonicRegression
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import (
    BayesianRidge,
    ElasticNet,
    HuberRegressor,
    LassoCV,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    PoissonRegressor,
    Ridge,
    RidgeClassifier,
    RidgeCV,
    SGDClassifier,
)
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import FixedThresholdClassifier, GridSearchCV, RandomizedSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputRegressor, RegressorChain
from sklearn.naive_bayes import BernoulliNB, CategoricalNB, GaussianNB, MultinomialNB
from sklearn.neighbors import (
    KNeighborsClassifier,
    KNeighborsRegressor,
    LocalOutlierFactor,
    NeighborhoodComponentsAnalysis,
)
from sklearn.neural_network import BernoulliRBM, MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import (
    FunctionTransformer,
    KBinsDiscretizer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    SplineTransformer,
    StandardScaler,
    TargetEncoder,
)
from sklearn.svm import SVC, SVR, LinearSVC, OneClassSVM
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from tests.support import hostile

pytestmark = pytest.mark.sampled(2)


@cache
def loaded(name):
    """(X, y) of a bundled data set; the large ones are thinned."""
    step = {"digits": 9, "breast_cancer": 2, "diabetes": 2}.get(name, 1)
    X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return X[::step], y[::step]


def named(name, *, text=False):
    """A data set as a frame with its own column names; with ``text``, two columns cut into named categories."""
    X, y = loaded(name)
    names = getattr(datasets, f"load_{name}")().feature_names
    frame = pd.DataFrame(X, columns=[str(n) for n in names])
    if text:
        frame["size"] = pd.cut(X[:, 0], 3, labels=["small", "medium", "large"]).astype(object)
        frame["shape"] = pd.Categorical(np.where(X[:, 1] > np.median(X[:, 1]), "wide", "narrow"))
    return frame, y


def holed(name):
    """A data set with a tenth of its values missing."""
    X, y = loaded(name)
    return np.where(np.random.default_rng(0).random(X.shape) < 0.1, np.nan, X), y


def species():
    """Iris with the names of its species as labels."""
    X, y = loaded("iris")
    return X, datasets.load_iris().target_names[y]


def malignant():
    """Breast cancer with truth values as labels."""
    X, y = loaded("breast_cancer")
    return X, y == 0


def one_column():
    """One column of diabetes."""
    X, y = loaded("diabetes")
    return X[:, 2:3], y


def progress_and_text():
    """Diabetes with two columns of text, and the logarithm of its target: no whole numbers."""
    X, y = named("diabetes", text=True)
    return X, np.log(y)


def by_kind(last, numbers=None, categories=None):
    """Numbers scaled, categories encoded, then ``last``."""
    return make_pipeline(
        ColumnTransformer(
            [
                ("numbers", numbers or StandardScaler(), make_column_selector(dtype_include="number")),
                (
                    "categories",
                    categories or OneHotEncoder(handle_unknown="ignore"),
                    make_column_selector(dtype_exclude="number"),
                ),
            ]
        ),
        last,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A pipeline and its data; ``refused`` is what the refusal must say, None for a proven one.

    ``slow`` ones take longest, and other quick tests have each of their estimators.
    """

    name: str
    model: Callable[[], Any]
    data: Callable[[], Any]
    refused: str | None = None
    slow: bool = False


def case(name, data, model, *, refused=None, slow=False):
    """A `Case`; ``data`` is the name of a data set or a function."""
    return Case(
        name=name,
        model=model,
        data=(lambda: loaded(data)) if isinstance(data, str) else data,
        refused=refused,
        slow=slow,
    )


def _log(values):
    return np.log1p(values)


CASES = [
    # classifiers
    case("scaled logistic", "iris", lambda: make_pipeline(StandardScaler(), LogisticRegression())),
    case(
        "scaled logistic, text labels", species, lambda: make_pipeline(StandardScaler(), LogisticRegression())
    ),
    case("scaled svc", "wine", lambda: make_pipeline(StandardScaler(), SVC())),
    case(
        "scaled linear svc", "breast_cancer", lambda: make_pipeline(MinMaxScaler(), LinearSVC(random_state=0))
    ),
    case("pca lda", "wine", lambda: make_pipeline(StandardScaler(), PCA(5), LinearDiscriminantAnalysis())),
    case(
        "pca forest",
        "wine",
        lambda: make_pipeline(StandardScaler(), PCA(4), RandomForestClassifier(20, random_state=0)),
    ),
    case("pca knn", "iris", lambda: make_pipeline(StandardScaler(), PCA(2), KNeighborsClassifier())),
    case(
        "leaves logistic",
        "iris",
        lambda: make_pipeline(RandomTreesEmbedding(6, random_state=0), LogisticRegression()),
    ),
    case(
        "pca svc on pixels",
        "digits",
        lambda: make_pipeline(StandardScaler(), PCA(16, random_state=0), SVC(C=10)),
    ),
    case(
        "k best logistic",
        malignant,
        lambda: make_pipeline(StandardScaler(), SelectKBest(f_classif, k=8), LogisticRegression()),
    ),
    case(
        "mutual information tree",
        "iris",
        lambda: make_pipeline(SelectKBest(mutual_info_classif, k=2), DecisionTreeClassifier(random_state=0)),
    ),
    case(
        "select from forest",
        "wine",
        lambda: make_pipeline(
            SelectFromModel(ExtraTreesClassifier(10, random_state=0)), LogisticRegression(max_iter=5000)
        ),
        slow=True,
    ),
    case(
        "sequential selection",
        "iris",
        lambda: make_pipeline(
            StandardScaler(),
            SequentialFeatureSelector(RidgeClassifier(), n_features_to_select=2, cv=2),
            RidgeClassifier(),
        ),
    ),
    case("rfecv", "iris", lambda: make_pipeline(StandardScaler(), RFECV(LogisticRegression(), cv=3))),
    case("random forest", "breast_cancer", lambda: RandomForestClassifier(30, random_state=0)),
    case("forest on pixels", "digits", lambda: RandomForestClassifier(15, random_state=0), slow=True),
    case(
        "variance threshold forest",
        "digits",
        lambda: make_pipeline(VarianceThreshold(), ExtraTreesClassifier(10, max_depth=6, random_state=0)),
        slow=True,
    ),
    case("gradient boosting", "iris", lambda: GradientBoostingClassifier(n_estimators=15, random_state=0)),
    case(
        "grid-searched boosting",
        "breast_cancer",
        lambda: GridSearchCV(HistGradientBoostingClassifier(max_iter=8), {"max_depth": [2, 4]}, cv=2),
    ),
    case(
        "random search over svc",
        "wine",
        lambda: RandomizedSearchCV(
            make_pipeline(StandardScaler(), SVC()),
            {"svc__C": [0.1, 1, 10], "svc__gamma": ["scale", 0.1]},
            n_iter=3,
            cv=2,
            random_state=0,
        ),
    ),
    case("boosting with gaps", lambda: holed("wine"), lambda: HistGradientBoostingClassifier(max_iter=8)),
    case(
        "imputed forest",
        lambda: holed("iris"),
        lambda: make_pipeline(
            SimpleImputer(strategy="median", add_indicator=True), RandomForestClassifier(15, random_state=0)
        ),
    ),
    case(
        "imputed logistic",
        lambda: holed("wine"),
        lambda: make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression()),
    ),
    case(
        "bins naive bayes",
        "iris",
        lambda: make_pipeline(
            KBinsDiscretizer(4, encode="ordinal", strategy="uniform"), CategoricalNB(min_categories=4)
        ),
    ),
    case(
        "bins bernoulli",
        "wine",
        lambda: make_pipeline(
            KBinsDiscretizer(5, encode="onehot-dense", quantile_method="averaged_inverted_cdf"), BernoulliNB()
        ),
        slow=True,
    ),
    case("gaussian naive bayes", "wine", lambda: make_pipeline(PowerTransformer(), GaussianNB())),
    case("multinomial pixels", "digits", MultinomialNB),
    case(
        "quantile network",
        "iris",
        lambda: make_pipeline(
            QuantileTransformer(n_quantiles=50, output_distribution="normal"),
            MLPClassifier((8,), max_iter=60, random_state=0),
        ),
    ),
    case(
        "restricted boltzmann pixels",
        "digits",
        lambda: make_pipeline(
            MinMaxScaler(), BernoulliRBM(12, n_iter=2, random_state=0), LogisticRegression()
        ),
    ),
    case(
        "stacked forests",
        "iris",
        lambda: StackingClassifier(
            [
                ("forest", RandomForestClassifier(8, random_state=0)),
                ("svc", make_pipeline(StandardScaler(), SVC())),
            ],
            cv=2,
        ),
        slow=True,
    ),
    case(
        "soft vote",
        species,
        lambda: VotingClassifier(
            [
                ("logistic", make_pipeline(StandardScaler(), LogisticRegression())),
                ("forest", RandomForestClassifier(8, random_state=0)),
                ("bayes", GaussianNB()),
            ],
            voting="soft",
        ),
    ),
    case(
        "calibrated linear svc",
        "breast_cancer",
        lambda: make_pipeline(StandardScaler(), CalibratedClassifierCV(LinearSVC(random_state=0), cv=3)),
    ),
    case(
        "isotonic calibration",
        malignant,
        lambda: CalibratedClassifierCV(RandomForestClassifier(8, random_state=0), method="isotonic", cv=3),
        slow=True,
    ),
    case("adaboost", "wine", lambda: AdaBoostClassifier(n_estimators=10, random_state=0), slow=True),
    case("discriminants", "iris", lambda: make_pipeline(StandardScaler(), QuadraticDiscriminantAnalysis())),
    case(
        "own threshold",
        malignant,
        lambda: FixedThresholdClassifier(
            make_pipeline(StandardScaler(), LogisticRegression()), threshold=0.2
        ),
    ),
    case(
        "stochastic one vs rest",
        "digits",
        lambda: make_pipeline(
            MaxAbsScaler(), OneVsRestClassifier(SGDClassifier(loss="log_loss", random_state=0))
        ),
    ),
    case(
        "learned metric knn",
        "iris",
        lambda: make_pipeline(
            StandardScaler(),
            NeighborhoodComponentsAnalysis(n_components=2, max_iter=20, random_state=0),
            KNeighborsClassifier(3),
        ),
    ),
    case(
        "two views",
        "wine",
        lambda: make_pipeline(StandardScaler(), make_union(PCA(3), SelectKBest(k=3)), LogisticRegression()),
    ),
    case(
        "kernel approximation",
        "wine",
        lambda: make_pipeline(
            StandardScaler(), Nystroem(n_components=30, random_state=0), LogisticRegression()
        ),
    ),
    case(
        "normalised logistic",
        "iris",
        lambda: make_pipeline(
            Normalizer(), LogisticRegressionCV(Cs=3, cv=2, use_legacy_attributes=False, scoring="accuracy")
        ),
    ),
    case(
        "probabilities of libsvm",
        "iris",
        lambda: SVC(probability=True, random_state=0),
    ),
    # data frames
    case("frame of text logistic", lambda: named("iris", text=True), lambda: by_kind(LogisticRegression())),
    case(
        "frame of text forest",
        lambda: named("wine", text=True),
        lambda: by_kind(
            RandomForestClassifier(10, random_state=0),
            "passthrough",
            OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1),
        ),
        slow=True,
    ),
    case(
        "frame of text boosting",
        lambda: named("diabetes", text=True),
        lambda: by_kind(
            GradientBoostingRegressor(n_estimators=10, random_state=0),
            RobustScaler(),
            OneHotEncoder(drop="first", handle_unknown="ignore", min_frequency=5),
        ),
        slow=True,
    ),
    case(
        "target encoding",
        progress_and_text,
        lambda: by_kind(Ridge(), categories=TargetEncoder(random_state=0)),
    ),
    case(
        "frame of numbers",
        lambda: named("breast_cancer"),
        lambda: make_pipeline(StandardScaler(), HistGradientBoostingClassifier(max_iter=6)),
    ),
    case(
        "frame, columns by name",
        lambda: named("wine"),
        lambda: make_pipeline(
            ColumnTransformer(
                [
                    ("log", FunctionTransformer(np.log1p), ["proline", "magnesium"]),
                    ("bins", KBinsDiscretizer(4, quantile_method="averaged_inverted_cdf"), ["hue"]),
                ],
                remainder=MinMaxScaler(),
            ),
            LogisticRegression(),
        ),
        slow=True,
    ),
    # regressors
    case(
        "polynomial ridge",
        "diabetes",
        lambda: make_pipeline(StandardScaler(), PolynomialFeatures(2), RidgeCV()),
    ),
    case(
        "splines elastic net",
        "diabetes",
        lambda: make_pipeline(SplineTransformer(n_knots=4), ElasticNet(alpha=0.01)),
    ),
    case(
        "scaled svr",
        "diabetes",
        lambda: TransformedTargetRegressor(
            make_pipeline(StandardScaler(), SVR()), transformer=StandardScaler()
        ),
    ),
    case(
        "log target",
        "diabetes",
        lambda: TransformedTargetRegressor(
            make_pipeline(StandardScaler(), LinearRegression()), func=np.log1p, inverse_func=np.expm1
        ),
    ),
    case(
        "quantile target",
        "diabetes",
        lambda: TransformedTargetRegressor(
            Ridge(), transformer=QuantileTransformer(n_quantiles=40, output_distribution="normal")
        ),
    ),
    case("lasso", "diabetes", lambda: make_pipeline(StandardScaler(), LassoCV(cv=3))),
    case(
        "huber and bayes",
        "diabetes",
        lambda: VotingRegressor(
            [("huber", make_pipeline(StandardScaler(), HuberRegressor())), ("bayes", BayesianRidge())]
        ),
    ),
    case("poisson", "diabetes", lambda: make_pipeline(StandardScaler(), PoissonRegressor())),
    case("regression forest", "diabetes", lambda: RandomForestRegressor(15, random_state=0)),
    case(
        "boosting quantile",
        "diabetes",
        lambda: HistGradientBoostingRegressor(max_iter=10, loss="quantile", quantile=0.9),
    ),
    case(
        "boosting with a log link",
        "diabetes",
        lambda: HistGradientBoostingRegressor(max_iter=10, loss="poisson"),
    ),
    case(
        "bagged trees",
        "diabetes",
        lambda: BaggingRegressor(
            DecisionTreeRegressor(max_depth=5, random_state=0), 8, max_features=0.7, random_state=0
        ),
    ),
    case(
        "stacked regressors",
        "diabetes",
        lambda: StackingRegressor(
            [("ridge", RidgeCV()), ("trees", ExtraTreesRegressor(8, max_depth=5, random_state=0))], cv=2
        ),
    ),
    case(
        "regression network",
        "diabetes",
        lambda: make_pipeline(
            StandardScaler(), MLPRegressor(hidden_layer_sizes=(10,), max_iter=60, random_state=0)
        ),
    ),
    case(
        "gaussian process",
        "diabetes",
        lambda: GaussianProcessRegressor(RBF() + WhiteKernel(), normalize_y=True, random_state=0),
        slow=True,
    ),
    case(
        "neighbours",
        "diabetes",
        lambda: make_pipeline(StandardScaler(), KNeighborsRegressor(weights="distance")),
    ),
    case("partial least squares", "linnerud", lambda: PLSRegression(n_components=2)),
    case("isotonic", one_column, lambda: IsotonicRegression(out_of_bounds="clip")),
    case("several targets, linear", "linnerud", lambda: make_pipeline(StandardScaler(), LinearRegression())),
    case(
        "several targets, each",
        "linnerud",
        lambda: MultiOutputRegressor(GradientBoostingRegressor(n_estimators=8, random_state=0)),
    ),
    case(
        "several targets, a chain",
        "linnerud",
        lambda: RegressorChain(make_pipeline(StandardScaler(), Ridge())),
    ),
    case("several targets, a forest", "linnerud", lambda: RandomForestRegressor(8, random_state=0)),
    case(
        "independent components",
        "wine",
        lambda: make_pipeline(StandardScaler(), FastICA(3, random_state=0), LogisticRegression()),
    ),
    case(
        "truncated svd",
        "digits",
        lambda: make_pipeline(TruncatedSVD(10, random_state=0), LogisticRegression(max_iter=3000)),
    ),
    case(
        "kernel components",
        "iris",
        lambda: make_pipeline(StandardScaler(), KernelPCA(3, kernel="rbf"), LogisticRegression()),
    ),
    case(
        "a function of one's own",
        "iris",
        lambda: make_pipeline(FunctionTransformer(_log), LogisticRegression()),
        refused="FunctionTransformer",
    ),
    # outliers and clusters
    case("isolation forest", "breast_cancer", lambda: IsolationForest(n_estimators=15, random_state=0)),
    case("one class", "wine", lambda: make_pipeline(StandardScaler(), OneClassSVM(nu=0.1))),
    case("envelope", "iris", lambda: EllipticEnvelope(random_state=0)),
    case(
        "local outliers",
        "wine",
        lambda: make_pipeline(StandardScaler(), LocalOutlierFactor(novelty=True)),
        slow=True,
    ),
    case("k means", "iris", lambda: make_pipeline(StandardScaler(), KMeans(3, n_init=2, random_state=0))),
    case(
        "k means on components",
        "digits",
        lambda: make_pipeline(PCA(5, random_state=0), KMeans(10, n_init=1, random_state=0)),
    ),
    case("birch", "iris", lambda: make_pipeline(StandardScaler(), Birch(n_clusters=3))),
    case(
        "mixture", "wine", lambda: make_pipeline(StandardScaler(), PCA(3), GaussianMixture(3, random_state=0))
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case",  # every second one, and all of them in the long run
    [
        pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow or k % 2 else [])
        for k, c in enumerate(CASES)
    ],
)
def test_a_realistic_pipeline_is_proven_or_refused_as_expected(case, tmp_path):
    X, y = case.data()
    fitted = case.model().fit(X, y)
    found = hostile.verdict(fitted, X, tmp_path / "m.onnx", probes=600, count=160)
    if case.refused is not None:
        assert found.state == "refused", found.detail
        assert case.refused in found.detail
        return
    assert found.state == "proven", found.detail
    assert found.rows > 100


def test_the_table_is_wide_enough():
    names = [c.name for c in CASES]
    assert len(names) == len(set(names)) >= 60
    assert sum(c.refused is None for c in CASES) >= 0.95 * len(CASES)
