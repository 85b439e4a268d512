"""Kernel machines, Gaussian processes and neural networks as graphs."""

import warnings

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.special import erf as reference_erf
from sklearn.datasets import load_diabetes, load_iris
from sklearn.decomposition import KernelPCA
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import (
    RBF,
    ConstantKernel,
    DotProduct,
    ExpSineSquared,
    Matern,
    RationalQuadratic,
    WhiteKernel,
)
from sklearn.kernel_approximation import AdditiveChi2Sampler, Nystroem, RBFSampler, SkewedChi2Sampler
from sklearn.kernel_ridge import KernelRidge
from sklearn.neural_network import BernoulliRBM, MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR, NuSVC, NuSVR, OneClassSVM

from converters.lowering.functions import erf
from converters.lowering.rules import RULES
from edge_runtime.contract.errors import UnsupportedPipeline
from tests.support import lowered

pytestmark = pytest.mark.sampled(2)

IRIS, SPECIES = load_iris(return_X_y=True)
IRIS, SPECIES = IRIS[::2], SPECIES[::2]
DIABETES, PROGRESS = (part[:80] for part in load_diabetes(return_X_y=True))
TARGETS = np.stack([PROGRESS, np.sqrt(PROGRESS[::-1])], axis=1)
TWO = SPECIES > 0
LABELS = {
    "text": (IRIS[TWO], np.array(["a", "b"])[SPECIES[TWO] - 1]),
    "numbers": (IRIS, np.array([-3, 0, 7])[SPECIES]),
}
SEVERAL = np.stack([SPECIES == 0, SPECIES > 0, IRIS[:, 0] > 5.5], axis=1).astype(int)


def hostile(rows, largest=1e8):
    rng = np.random.default_rng(0)
    picked = rows[rng.integers(len(rows), size=20)] * rng.normal(0, 100, (20, 1))
    width = rows.shape[1]
    ends = [
        np.zeros((1, width)),
        np.full((1, width), 1e-40),
        np.eye(width) * largest,
        np.eye(width) * -largest,
    ]
    return np.concatenate([rows, picked, *ends]).astype(np.float32).astype(np.float64)


def check(estimator, X, y, largest=1e8):
    with warnings.catch_warnings():  # few iterations are enough here
        warnings.simplefilter("ignore")
        model = make_pipeline(StandardScaler(), estimator).fit(X, y)
        return model, lowered.assert_equal(model, hostile(X, largest))


SHAPES = [
    {},
    {"kernel": "linear"},
    {"kernel": "poly"},
    {"kernel": "poly", "degree": 2, "coef0": 1.5, "gamma": 0.3},
    {"kernel": "sigmoid", "gamma": "auto", "coef0": 0.1},
    {"gamma": 20.0},
]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("options", [*SHAPES, {"decision_function_shape": "ovo"}, {"break_ties": True}])
@pytest.mark.parametrize("kind", [SVC, NuSVC])
def test_support_vector_classifiers(kind, options, labels):
    more = {"nu": 0.2} if kind is NuSVC else {}
    model, found = check(kind(**options, **more), *LABELS[labels])
    embedded = len(model[-1].support_)
    notes = (
        [] if options.get("kernel") == "linear" else [f"carries {embedded} training rows ({kind.__name__})"]
    )
    assert found.lowering.notes == notes


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("kind", [SVR, NuSVR])
def test_support_vector_regressors(kind, options):
    check(kind(C=10.0, **options), DIABETES, PROGRESS)


def test_a_regressor_without_support_vectors():
    model, _ = check(SVR(epsilon=1e4), DIABETES, PROGRESS)
    assert len(model[-1].support_) == 0


@pytest.mark.parametrize("options", SHAPES)
def test_one_class(options):
    check(OneClassSVM(nu=0.2, **options), IRIS, None)


def test_a_decision_of_exactly_zero_is_the_second_class():
    """libsvm asks whether its own value, of the opposite sign, is above 0."""
    model = SVC(kernel="linear").fit([[-1.0], [1.0]], [0, 1])
    assert model.decision_function([[0.0]])[0] == 0
    assert model.predict([[0.0]])[0] == lowered.run(model, np.zeros((1, 1))).labels[0] == 1


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        (make_pipeline(StandardScaler(), SVC(kernel=lambda a, b: a @ b.T)), "kernel='rbf'"),
        (SVC(break_ties=True, decision_function_shape="ovo"), "decision_function_shape='ovr'"),
        (KernelRidge(kernel="chi2", gamma=0.5), "kernel='rbf'"),
    ],
)
def test_what_cannot_be_mirrored_is_refused(model, remedy):
    model.fit(IRIS, SPECIES)
    with pytest.raises(UnsupportedPipeline, match=remedy):
        lowered.run(model, IRIS)


def test_sparse_rows_are_refused():
    with pytest.raises(UnsupportedPipeline, match="dense"):
        lowered.run(SVC().fit(csr_array(IRIS), SPECIES), IRIS)


@pytest.mark.parametrize("y", [PROGRESS, TARGETS], ids=["one", "two"])
@pytest.mark.parametrize("kernel", ["linear", "rbf", "poly", "polynomial", "sigmoid", "laplacian", "cosine"])
def test_kernel_ridge(kernel, y):
    check(KernelRidge(kernel=kernel, alpha=0.5), DIABETES, y)


KERNELS = [
    None,
    RBF(2.0),
    RBF(np.linspace(0.5, 3, 10)),
    *[Matern(2.0, nu=nu) for nu in (0.5, 1.5, 2.5, np.inf)],
    RationalQuadratic(2.0, 0.5),
    DotProduct(0.7),
    ConstantKernel(2.0),
    RBF() ** 2 + WhiteKernel(0.3) * DotProduct() + 1.5,
    ConstantKernel(3.0) ** 2 * Matern(3.0, nu=1.5) + WhiteKernel(),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_gaussian_process_regressor(kernel):
    check(GaussianProcessRegressor(kernel, alpha=0.1, optimizer=None, normalize_y=True), DIABETES, PROGRESS)
    check(GaussianProcessRegressor(kernel, alpha=0.1, optimizer=None), DIABETES, TARGETS)


def test_a_periodic_kernel_of_one_column():
    model = GaussianProcessRegressor(ExpSineSquared(2.0, 3.0), alpha=0.1, optimizer=None)
    check(model, DIABETES[:, :1], PROGRESS)
    with pytest.raises(UnsupportedPipeline, match="several columns"):
        check(model.set_params(alpha=50.0), DIABETES, PROGRESS)


def test_a_roughness_without_a_formula_is_refused():
    with pytest.raises(UnsupportedPipeline, match=r"nu=0\.7"):
        check(GaussianProcessRegressor(Matern(nu=0.7), optimizer=None), DIABETES, PROGRESS)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(
    "kernel", [None, 2.0 * RBF(1.5) + WhiteKernel(), 1.0 * DotProduct(), Matern(nu=1.5) ** 2], ids=str
)
def test_gaussian_process_classifier(kernel, labels):
    check(GaussianProcessClassifier(kernel, optimizer=None), *LABELS[labels])


def test_pairs_of_gaussian_processes_have_no_probabilities():
    with pytest.raises(UnsupportedPipeline, match="one_vs_rest"):
        check(GaussianProcessClassifier(multi_class="one_vs_one", optimizer=None), IRIS, SPECIES)


class _Erf:
    """Stands for the error function in the table of rules."""


def test_error_function(monkeypatch):
    monkeypatch.setitem(RULES, (_Erf, "transform"), lambda g, _, x: erf(g, x))
    x = np.concatenate([np.linspace(-7, 7, 4001), [0.0, -0.0, 1e-300, 1e-9, 1e300, -1e300, np.inf, -np.inf]])
    found = lowered.transform(_Erf(), x[:, None], dtype="float64")[:, 0]
    np.testing.assert_allclose(found, reference_erf(x), rtol=2e-14, atol=0)


@pytest.mark.parametrize(
    "step",
    [
        *[KernelPCA(3, kernel=kernel) for kernel in ("linear", "rbf", "poly", "sigmoid", "cosine")],
        *[
            Nystroem(kernel=kernel, n_components=20, random_state=0)
            for kernel in ("rbf", "laplacian", "poly", "linear")
        ],
        Nystroem(kernel="polynomial", gamma=0.2, degree=2, coef0=0.5, n_components=5, random_state=0),
        RBFSampler(n_components=9, random_state=0),
        SkewedChi2Sampler(n_components=9, random_state=0),
        *[AdditiveChi2Sampler(sample_steps=steps) for steps in (1, 2, 3)],
        AdditiveChi2Sampler(sample_steps=5, sample_interval=0.3),
        BernoulliRBM(n_components=5, n_iter=3, random_state=0),
    ],
    ids=str,
)
def test_transformers(step):
    X = IRIS.astype(np.float32).astype(np.float64)
    step.fit(X)
    rows = np.concatenate([X, np.zeros((1, 4)), X[:5] * 32])
    np.testing.assert_allclose(lowered.transform(step, rows), step.transform(rows), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("step", [AdditiveChi2Sampler(), SkewedChi2Sampler(skewedness=1.0)], ids=str)
def test_rows_that_scikit_learn_refuses_give_nan(step):
    step.fit(IRIS)
    rows = np.array([[-2.0, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"egative|skewedness"):
        step.transform(rows)
    assert np.isnan(lowered.transform(step, rows)).any()


@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
def test_neural_networks(activation):
    options = {"hidden_layer_sizes": (6, 3), "activation": activation, "max_iter": 20, "random_state": 0}
    for X, y in LABELS.values():
        check(MLPClassifier(**options), X, y)
    model, found = check(MLPClassifier(**options), IRIS, SEVERAL)
    assert np.array_equal(found.labels, model.predict(hostile(IRIS)))
    check(MLPRegressor(**options), DIABETES, PROGRESS)
    check(MLPRegressor(**options), DIABETES, TARGETS)


def test_a_network_with_an_exponential_at_its_end():
    options = {"hidden_layer_sizes": (), "loss": "poisson", "max_iter": 20, "random_state": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_pipeline(StandardScaler(), MLPRegressor(**options)).fit(DIABETES, PROGRESS)
    lowered.assert_equal(model, DIABETES)
    assert model[-1].out_activation_ == "exp"
