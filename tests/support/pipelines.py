"""Random pipelines of the kind people write, over random data: one `random.Random` decides everything.

The tables name each estimator with the values that its options may take; whatever scikit-learn cannot fit is somebody
else's problem (`fit` says so).
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn import (
    calibration,
    cluster,
    compose,
    cross_decomposition,
    decomposition,
    discriminant_analysis,
    dummy,
    ensemble,
    feature_selection,
    gaussian_process,
    impute,
    kernel_approximation,
    kernel_ridge,
    linear_model,
    mixture,
    model_selection,
    multiclass,
    multioutput,
    naive_bayes,
    neighbors,
    neural_network,
    pipeline,
    preprocessing,
    random_projection,
    semi_supervised,
    svm,
    tree,
)
from sklearn.experimental import enable_iterative_imputer  # noqa: F401 - it makes IterativeImputer known

# (class, {option: values that it may take beside its default}, {option: values of which it must take one})
Table = tuple[tuple[Any, ...], ...]

CLEANERS: Table = (
    (
        impute.SimpleImputer,
        {
            "strategy": ("median", "most_frequent", "constant"),
            "add_indicator": (True,),
            "keep_empty_features": (True,),
        },
    ),
    (impute.KNNImputer, {"n_neighbors": (1, 3), "weights": ("distance",), "add_indicator": (True,)}),
    (impute.IterativeImputer, {"max_iter": (2,), "initial_strategy": ("median",), "random_state": (0,)}),
)
SCALERS: Table = (
    (preprocessing.StandardScaler, {"with_mean": (False,), "with_std": (False,)}),
    (preprocessing.MinMaxScaler, {"feature_range": ((-1, 3),), "clip": (True,)}),
    (preprocessing.MaxAbsScaler, {}),
    (
        preprocessing.RobustScaler,
        {"with_centering": (False,), "with_scaling": (False,), "unit_variance": (True,)},
    ),
)
STEPS: Table = (
    *SCALERS,
    *SCALERS,
    (preprocessing.Normalizer, {"norm": ("l1", "max")}),
    (preprocessing.QuantileTransformer, {"n_quantiles": (5, 20), "output_distribution": ("normal",)}),
    (preprocessing.PowerTransformer, {"standardize": (False,)}),
    (
        preprocessing.KBinsDiscretizer,
        {
            "n_bins": (2, 3, 7),
            "encode": ("ordinal", "onehot-dense"),
            "strategy": ("uniform", "kmeans"),
            "quantile_method": ("averaged_inverted_cdf",),
        },
    ),
    (preprocessing.Binarizer, {"threshold": (0.5, -1.0)}),
    (
        preprocessing.PolynomialFeatures,
        {"degree": (1, 3), "interaction_only": (True,), "include_bias": (False,)},
    ),
    (
        preprocessing.SplineTransformer,
        {
            "degree": (1, 2),
            "n_knots": (3, 4),
            "extrapolation": ("linear", "continue", "periodic"),
            "include_bias": (False,),
            "knots": ("quantile",),
        },
    ),
    (preprocessing.FunctionTransformer, {"func": (np.abs, np.sign, np.square, np.tanh, np.arctan)}),
    (decomposition.PCA, {"n_components": (1, 2, 0.9), "whiten": (True,)}),
    (decomposition.TruncatedSVD, {"n_components": (1,), "random_state": (0,)}),
    (decomposition.FastICA, {"random_state": (0,), "max_iter": (20,)}),
    (decomposition.FactorAnalysis, {"n_components": (1, 2), "max_iter": (20,)}),
    (decomposition.KernelPCA, {"n_components": (2,), "kernel": ("rbf", "poly", "cosine"), "gamma": (0.1,)}),
    (kernel_approximation.Nystroem, {"n_components": (5,), "random_state": (0,)}),
    (kernel_approximation.RBFSampler, {"n_components": (6,), "random_state": (0,), "gamma": (0.1,)}),
    (random_projection.GaussianRandomProjection, {"n_components": (2,), "random_state": (0,)}),
    (feature_selection.SelectKBest, {"k": (1, 2, "all")}),
    (feature_selection.SelectPercentile, {"percentile": (50, 80)}),
    (feature_selection.VarianceThreshold, {}),
    (discriminant_analysis.LinearDiscriminantAnalysis, {"n_components": (1,), "solver": ("eigen",)}),
    (cluster.KMeans, {"n_clusters": (3,), "n_init": (1,), "random_state": (0,)}),
    (cluster.FeatureAgglomeration, {"n_clusters": (1,)}),
    (
        ensemble.RandomTreesEmbedding,
        {"n_estimators": (3,), "max_depth": (2,), "sparse_output": (False,), "random_state": (0,)},
    ),
    (neighbors.NeighborhoodComponentsAnalysis, {"max_iter": (5,), "random_state": (0,)}),
)
_FOREST = {
    "n_estimators": (1, 5, 9),
    "max_depth": (1, 3, 6),
    "max_features": (None, 1),
    "bootstrap": (True, False),
    "min_samples_leaf": (3,),
    "random_state": (0,),
}
_SVM = {"kernel": ("linear", "poly", "sigmoid"), "gamma": ("auto", 0.1), "C": (0.1, 10.0)}
CLASSIFIERS: Table = (
    (
        linear_model.LogisticRegression,
        {"C": (0.1, 10.0), "fit_intercept": (False,), "class_weight": ("balanced",)},
    ),
    (
        linear_model.SGDClassifier,
        {"loss": ("log_loss", "modified_huber", "perceptron"), "random_state": (0,), "max_iter": (20,)},
    ),
    (linear_model.RidgeClassifier, {"alpha": (0.1,)}),
    (linear_model.Perceptron, {"random_state": (0,)}),
    (
        svm.SVC,
        {
            **_SVM,
            "decision_function_shape": ("ovo",),
            "break_ties": (True,),
            "class_weight": ("balanced",),
            "random_state": (0,),
        },
    ),
    (svm.NuSVC, {"kernel": ("linear", "poly"), "nu": (0.3, 0.2), "gamma": ("auto",)}),
    (svm.LinearSVC, {"C": (0.1,), "random_state": (0,)}),
    (
        tree.DecisionTreeClassifier,
        {"max_depth": (2, 5), "criterion": ("entropy",), "random_state": (0,), "class_weight": ("balanced",)},
    ),
    (tree.ExtraTreeClassifier, {"random_state": (0,), "max_depth": (4,)}),
    (ensemble.RandomForestClassifier, _FOREST),
    (ensemble.ExtraTreesClassifier, _FOREST),
    (
        ensemble.GradientBoostingClassifier,
        {
            "n_estimators": (3, 10),
            "learning_rate": (1.0,),
            "loss": ("exponential",),
            "init": ("zero",),
            "random_state": (0,),
        },
    ),
    (
        ensemble.HistGradientBoostingClassifier,
        {"max_iter": (3, 10), "min_samples_leaf": (3,), "max_bins": (16,), "max_depth": (3,)},
    ),
    (ensemble.AdaBoostClassifier, {"n_estimators": (3, 8), "random_state": (0,)}),
    (naive_bayes.GaussianNB, {"var_smoothing": (1e-3,)}),
    (naive_bayes.BernoulliNB, {"binarize": (0.5,), "fit_prior": (False,)}),
    (neighbors.KNeighborsClassifier, {"n_neighbors": (1, 3), "weights": ("distance",), "p": (1, 3)}),
    (neighbors.NearestCentroid, {"metric": ("manhattan",), "shrink_threshold": (0.2,)}),
    (discriminant_analysis.LinearDiscriminantAnalysis, {"solver": ("lsqr",), "shrinkage": (None,)}),
    (discriminant_analysis.QuadraticDiscriminantAnalysis, {"reg_param": (0.1, 0.5)}),
    (
        neural_network.MLPClassifier,
        {
            "hidden_layer_sizes": ((4,), (3, 3)),
            "activation": ("tanh", "logistic", "identity"),
            "max_iter": (15,),
            "random_state": (0,),
        },
    ),
    (
        gaussian_process.GaussianProcessClassifier,
        {"random_state": (0,), "multi_class": ("one_vs_one",), "optimizer": (None,)},
    ),
    (dummy.DummyClassifier, {"strategy": ("most_frequent", "prior", "stratified")}),
    (semi_supervised.LabelPropagation, {"kernel": ("knn",), "gamma": (1.0,)}),
)
REGRESSORS: Table = (
    (linear_model.LinearRegression, {"fit_intercept": (False,), "positive": (True,)}),
    (linear_model.Ridge, {"alpha": (0.01, 10.0)}),
    (linear_model.ElasticNet, {"alpha": (0.01,), "l1_ratio": (0.1,)}),
    (linear_model.Lasso, {"alpha": (0.01,)}),
    (linear_model.BayesianRidge, {}),
    (linear_model.HuberRegressor, {"max_iter": (20,)}),
    (linear_model.TweedieRegressor, {"power": (0, 1), "link": ("log", "identity")}),
    (
        linear_model.SGDRegressor,
        {"loss": ("huber", "epsilon_insensitive"), "random_state": (0,), "max_iter": (20,)},
    ),
    (linear_model.Lars, {"n_nonzero_coefs": (2,)}),
    (svm.SVR, _SVM),
    (svm.LinearSVR, {"random_state": (0,)}),
    (tree.DecisionTreeRegressor, {"max_depth": (2, 6), "criterion": ("poisson",), "random_state": (0,)}),
    (ensemble.RandomForestRegressor, _FOREST),
    (ensemble.ExtraTreesRegressor, _FOREST),
    (
        ensemble.GradientBoostingRegressor,
        {"n_estimators": (3, 10), "loss": ("huber", "quantile"), "random_state": (0,)},
    ),
    (
        ensemble.HistGradientBoostingRegressor,
        {"max_iter": (3, 10), "min_samples_leaf": (3,), "loss": ("poisson", "absolute_error")},
    ),
    (
        ensemble.AdaBoostRegressor,
        {"n_estimators": (3, 6), "loss": ("square", "exponential"), "random_state": (0,)},
    ),
    (
        neighbors.KNeighborsRegressor,
        {"n_neighbors": (1, 3), "weights": ("distance",), "metric": ("manhattan", "chebyshev")},
    ),
    (
        neural_network.MLPRegressor,
        {
            "hidden_layer_sizes": ((4,), (3, 3)),
            "activation": ("tanh", "logistic"),
            "max_iter": (15,),
            "random_state": (0,),
        },
    ),
    (kernel_ridge.KernelRidge, {"kernel": ("rbf", "poly", "laplacian"), "gamma": (0.1,)}),
    (
        gaussian_process.GaussianProcessRegressor,
        {"normalize_y": (True,), "alpha": (1e-3, 0.1), "optimizer": (None,)},
    ),
    (cross_decomposition.PLSRegression, {"n_components": (1, 2), "scale": (False,)}),
    (dummy.DummyRegressor, {"strategy": ("median",)}),
)
UNSUPERVISED: Table = (
    (cluster.KMeans, {"n_clusters": (2, 4), "n_init": (1,), "random_state": (0,)}),
    (cluster.MiniBatchKMeans, {"n_clusters": (2, 4), "n_init": (1,), "random_state": (0,)}),
    (cluster.BisectingKMeans, {"n_clusters": (2, 5), "random_state": (0,)}),
    (cluster.Birch, {"n_clusters": (None, 2), "threshold": (1.0,)}),
    (cluster.MeanShift, {"bandwidth": (1.0, 2.0)}),
    (cluster.AffinityPropagation, {"random_state": (0,)}),
    (
        mixture.GaussianMixture,
        {"n_components": (2, 3), "covariance_type": ("tied", "diag", "spherical"), "random_state": (0,)},
    ),
    (mixture.BayesianGaussianMixture, {"n_components": (2, 3), "random_state": (0,)}),
    (ensemble.IsolationForest, {"n_estimators": (5, 20), "contamination": (0.1,), "random_state": (0,)}),
    (svm.OneClassSVM, {"nu": (0.1,), "gamma": (0.1, "auto")}),
    (neighbors.LocalOutlierFactor, {"n_neighbors": (3, 8), "contamination": (0.1,)}),
    (linear_model.SGDOneClassSVM, {"nu": (0.1,), "random_state": (0,)}),
)
ENCODERS: Table = (
    (
        preprocessing.OneHotEncoder,
        {
            "drop": ("first", "if_binary"),
            "min_frequency": (2, 0.1),
            "max_categories": (2, 3),
            "sparse_output": (False,),
        },
        {"handle_unknown": ("ignore", "infrequent_if_exist", "error")},
    ),
    (
        preprocessing.OrdinalEncoder,
        {"encoded_missing_value": (-2,), "unknown_value": (-1, 99)},
        {"handle_unknown": ("use_encoded_value",)},
    ),
    (preprocessing.TargetEncoder, {"smooth": (1.0,), "cv": (3,)}, {}),
)
LABELS = (
    (False, True),
    ("no", "yes"),
    (-3, 7),
    (0, 1),
    (0.0, 1.0),
    (-1, 1),
    (0, 1, 2),
    ("a", "b", "c"),
    (-5, 0, 12),
    ("", "é", "z z"),
    (3.0, 1.0, 2.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A pipeline that is not fitted, and what to fit it on."""

    model: Any
    X: Any
    y: Any

    def __repr__(self):
        kinds = self.X.dtypes.astype(str).to_dict() if hasattr(self.X, "columns") else self.X.dtype
        y = None if self.y is None else self.y[:4]
        return f"{self.model!r}\n on {type(self.X).__name__} {self.X.shape} {kinds}, y {y}"

    def fit(self):
        """The fitted pipeline, or None where scikit-learn itself cannot fit or ask it."""
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            np.random.seed(0)  # noqa: NPY002 - estimators drawn without a random_state
            try:
                fitted = self.model.fit(self.X, self.y)
                answer = np.asarray(fitted.predict(self.X))
            except Exception:  # noqa: BLE001 (whatever it raises, a pipeline that cannot be fitted is none)
                return None
        finite = answer.dtype.kind != "f" or np.isfinite(answer).all()
        return fitted if finite and len(answer) == len(self.X) else None


def case(rng):
    """A random `Case`."""
    task = rng.choice(("classes", "classes", "numbers", "numbers", "none"))
    data = np.random.default_rng(rng.randrange(1 << 20))
    framed, holes = rng.random() < 0.35, rng.random() < 0.3
    X = frame(rng, data, holes) if framed else array(rng, data, holes)
    numbers = X.select_dtypes("number").to_numpy(float) if framed else X
    signal = np.nan_to_num(numbers[:, 0]) + 0.5 * np.nan_to_num(numbers[:, -1])
    signal = (signal - signal.mean()) / (signal.std() or 1.0) + 0.3 * data.normal(size=len(X))
    first = [columns(rng, X)] if framed else [built(rng, CLEANERS)] if holes and rng.random() < 0.7 else []
    if not framed and not first and rng.random() < 0.1:
        first = [union(rng)]
    steps = first + [built(rng, STEPS) for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 3)))]
    y, last = target(rng, data, signal, task)
    model = pipeline.make_pipeline(*steps, last) if steps else last
    return Case(model=model, X=X, y=y)


def built(rng, table, chance=0.5):
    """One estimator of a table, each of its options left alone or given one of its values."""
    kind, options, *needed = rng.choice(table)
    needed = needed[0] if needed else {}
    given = {name: rng.choice(values) for name, values in options.items() if rng.random() < chance}
    given.update({name: rng.choice(values) for name, values in needed.items()})
    if "random_state" in options:
        given["random_state"] = 0
    if kind in (ensemble.RandomForestClassifier, ensemble.ExtraTreesClassifier) or "bootstrap" in options:
        given.setdefault("n_estimators", 5)
    return kind(**given)


# --- data ------------------------------------------------------------------------------------------------------


def array(rng, data, holes):
    """Rows of numbers: smooth, whole, scaled, far from zero, tiny, or with a constant column."""
    n, width = rng.choice((40, 60, 90)), rng.choice((1, 2, 3, 4, 6))
    X = data.normal(size=(n, width))
    kind = rng.choice(
        ("smooth", "whole", "powers", "offset", "tiny", "large", "constant", "counts", "float32")
    )
    if kind == "whole":
        X = np.rint(3 * X)
    elif kind == "powers":
        X = data.integers(-20, 20, size=(n, width)) * 2.0 ** data.integers(-6, 7, size=width)
    elif kind == "offset":
        X = X + 1000.0
    elif kind in ("tiny", "large"):
        X = X * (1e-6 if kind == "tiny" else 1e6)
    elif kind == "constant":
        X[:, -1] = 7.0
    elif kind == "counts":
        X = data.poisson(2.0, size=(n, width)).astype(float)
    elif kind == "float32":
        X = X.astype(np.float32).astype(np.float64)
    if holes:
        X[data.random(X.shape) < 0.1] = np.nan
    return X


def frame(rng, data, holes):
    """Columns of numbers, whole numbers, truth values, text and categories, in any order, with odd names."""
    n = rng.choice((50, 80))
    number = data.normal(size=n)
    if holes:
        number[data.random(n) < 0.15] = np.nan
    colours = data.choice(["red", "green", "blue", "Ünï"], n)
    made = {
        "number": number,
        "a b-c": np.rint(4 * data.normal(size=n)),
        "count": data.integers(0, 9, n),
        "colour": pd.Series(colours, dtype=object),
        "size": pd.Categorical(data.choice(["S", "M", "L"], n), categories=["S", "M", "L"], ordered=True),
        "flag": data.random(n) < 0.4,
        "gap": pd.Series(
            [None if r < 0.2 else c for r, c in zip(data.random(n), colours, strict=True)], dtype=object
        ),
        "grade": pd.Series(data.choice([1, 2, 5], n), dtype="int64"),
    }
    kept = [name for name in made if rng.random() < 0.6 or name == "number"]
    rng.shuffle(kept)
    return pd.DataFrame({name: made[name] for name in kept})


def columns(rng, X):
    """A ColumnTransformer for a frame: numbers one way, categories another, the rest passed, dropped or scaled."""
    text = [c for c in X.columns if X[c].dtype == object or str(X[c].dtype) in ("str", "category")]
    plain = [c for c in X.columns if c not in text]
    some = [c for c in plain if X[c].dtype.kind == "f" or rng.random() < 0.7]
    chain = [built(rng, CLEANERS)] if X[some].isna().any().any() or rng.random() < 0.2 else []
    chain += [built(rng, STEPS) for _ in range(rng.choice((0, 1, 1, 2)))]
    number = pipeline.make_pipeline(*chain) if chain else "passthrough"
    chosen = rng.choice(
        (
            some,
            [list(X.columns).index(c) for c in some],
            [c in some for c in X.columns],
            lambda given: [c for c in given.columns if c in some],
        )
    )
    parts = [("numbers", number, chosen)]
    if text:
        encoder = built(rng, ENCODERS, 0.3)
        if rng.random() < 0.3:
            fill = impute.SimpleImputer(
                strategy=rng.choice(("most_frequent", "constant")), missing_values=None
            )
            encoder = pipeline.make_pipeline(fill, encoder)
        parts.append(("text", encoder, text))
    if rng.random() < 0.3:
        parts.append(("again", built(rng, SCALERS), [some[0]]))
    rng.shuffle(parts)
    rest = rng.choice(("drop", "passthrough", preprocessing.MinMaxScaler()))
    made = compose.ColumnTransformer(parts, remainder=rest, sparse_threshold=0.0)
    weights = {"numbers": 0.5} if rng.random() < 0.15 else None
    return made.set_params(transformer_weights=weights)


def union(rng):
    """A FeatureUnion of two steps, or a ColumnTransformer over slices of an array."""
    one, two = built(rng, STEPS), built(rng, STEPS)
    if rng.random() < 0.5:
        return pipeline.FeatureUnion([("one", one), ("two", rng.choice((two, "passthrough", "drop")))])
    return compose.ColumnTransformer(
        [("first", one, slice(0, 1)), ("last", two, slice(-1, None))],
        remainder=rng.choice(("drop", "passthrough")),
        sparse_threshold=0.0,
    )


# --- what comes last -------------------------------------------------------------------------------------------


def target(rng, data, signal, task):
    """(y, the last step): an estimator of any family, plain or inside a meta-estimator."""
    n = len(signal)
    if task == "none":
        return None, built(rng, UNSUPERVISED)
    if task == "numbers":
        y = signal * rng.choice((1.0, 100.0)) + rng.choice((0.0, 50.0))
        if rng.random() < 0.15:
            y = np.stack([y, data.normal(size=n)], axis=1)
            return y, many(rng, multioutput.MultiOutputRegressor, multioutput.RegressorChain, REGRESSORS)
        return y, regressor(rng)
    labels = rng.choice(LABELS)
    which = np.searchsorted(np.quantile(signal, np.arange(1, len(labels)) / len(labels)), signal)
    values = np.array(labels, dtype=object if rng.random() < 0.2 and isinstance(labels[0], str) else None)
    y = values[which]
    if rng.random() < 0.1:
        y = np.stack([y, values[data.integers(len(labels), size=n)]], axis=1)
        return y, multioutput.MultiOutputClassifier(built(rng, CLASSIFIERS))
    return y, classifier(rng, len(labels), labels)


def many(rng, each, chain, table):
    """Several targets: one estimator each, a chain, or an estimator that takes them all."""
    return rng.choice((each(built(rng, table)), chain(built(rng, table)), built(rng, table)))


def classifier(rng, classes, labels):
    """A classifier, one time in three inside a meta-estimator."""
    if rng.random() < 0.66:
        return built(rng, CLASSIFIERS)
    one, two = built(rng, CLASSIFIERS), built(rng, CLASSIFIERS)
    named = [("one", one), ("two", two)]
    grid = {"max_depth": [1, 3]} if isinstance(one, tree.DecisionTreeClassifier) else {}
    made = [
        ensemble.VotingClassifier(
            named, voting=rng.choice(("soft", "hard")), weights=rng.choice((None, [2, 1]))
        ),
        ensemble.StackingClassifier(named, cv=2, passthrough=rng.random() < 0.4),
        ensemble.BaggingClassifier(one, n_estimators=3, max_features=rng.choice((0.6, 1.0)), random_state=0),
        ensemble.AdaBoostClassifier(tree.DecisionTreeClassifier(max_depth=2), n_estimators=4, random_state=0),
        calibration.CalibratedClassifierCV(
            one, method=rng.choice(("sigmoid", "isotonic")), cv=2, ensemble=rng.random() < 0.5
        ),
        multiclass.OneVsRestClassifier(one),
        multiclass.OneVsOneClassifier(one),
        multiclass.OutputCodeClassifier(one, random_state=0),
        model_selection.GridSearchCV(one, grid, cv=2),
    ]
    if classes == 2:
        threshold = rng.choice((0.3, 0.5, "auto"))
        made.append(model_selection.FixedThresholdClassifier(one, threshold=threshold, pos_label=labels[1]))
    if isinstance(labels[0], int) and -1 not in labels:
        made.append(semi_supervised.SelfTrainingClassifier(one))
    return rng.choice(made)


def regressor(rng):
    """A regressor, one time in three inside a meta-estimator."""
    if rng.random() < 0.66:
        return built(rng, REGRESSORS)
    one, two = built(rng, REGRESSORS), built(rng, REGRESSORS)
    named = [("one", one), ("two", two)]
    return rng.choice(
        (
            ensemble.VotingRegressor(named, weights=rng.choice((None, [2, 1]))),
            ensemble.StackingRegressor(named, cv=2, passthrough=rng.random() < 0.4),
            ensemble.BaggingRegressor(
                one, n_estimators=3, max_features=rng.choice((0.6, 1.0)), random_state=0
            ),
            compose.TransformedTargetRegressor(
                one, transformer=rng.choice((preprocessing.StandardScaler(), preprocessing.MinMaxScaler()))
            ),
            compose.TransformedTargetRegressor(
                one, func=np.arcsinh, inverse_func=np.sinh, check_inverse=False
            ),
            linear_model.RANSACRegressor(random_state=0),
            model_selection.GridSearchCV(one, {}, cv=2),
        )
    )
