"""Every estimator that predicts converts and passes, or is refused, exactly as the page says."""

import re

import pytest

from tests.parity import coverage

# More than two seconds each, most of them because scikit-learn's own answers take that long.
SLOW = {
    "GaussianProcessClassifier",
    "HistGradientBoostingClassifier",
    "LogisticRegressionCV",
    "MeanShift",
    "RadiusNeighborsClassifier",
    "StackingClassifier",
    "TunedThresholdClassifierCV",
    "CalibratedClassifierCV",
    "CategoricalNB",
}
EVERY = list(coverage.estimators())


def on_the_page():
    """{name: state} of the page in docs/."""
    text = coverage.PAGE.read_text(encoding="utf-8")
    return dict(re.findall(r"^\| (\w+) \| (proven|refused|not fitted) \|", text, re.MULTILINE))


def test_the_page_lists_every_estimator_and_nearly_all_are_proven():
    states = on_the_page()
    assert sorted(states) == sorted(name for _, name, _ in EVERY)
    judged = [state for state in states.values() if state != "not fitted"]
    assert len(judged) == len(states), "everything can be fitted"
    assert judged.count("proven") >= 0.95 * len(judged)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "name", "made"),
    [pytest.param(*each, id=each[1], marks=[pytest.mark.slow] * (each[1] in SLOW)) for each in EVERY],
)
def test_an_estimator_does_as_the_page_says(kind, name, made):
    found = coverage.outcome(kind, name, made)
    assert found.state == on_the_page()[name], found.detail
