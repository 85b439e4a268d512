"""Every estimator that predicts or transforms converts and passes, or is refused, exactly as the page says."""

import re

import pytest

from tests.parity import coverage

pytestmark = pytest.mark.sampled(2)

# More than 0.7 seconds each, most of them because scikit-learn's own answers take that long; the quick tests of
# families, lowering and realistic pipelines have each of the forests and boostings, too.
SLOW = {
    ("classifier", "AdaBoostClassifier"),
    ("classifier", "CalibratedClassifierCV"),
    ("classifier", "CategoricalNB"),
    ("classifier", "ExtraTreesClassifier"),
    ("classifier", "GaussianProcessClassifier"),
    ("classifier", "GradientBoostingClassifier"),
    ("classifier", "HistGradientBoostingClassifier"),
    ("classifier", "LogisticRegressionCV"),
    ("classifier", "RadiusNeighborsClassifier"),
    ("classifier", "StackingClassifier"),
    ("classifier", "TunedThresholdClassifierCV"),
    ("cluster", "MeanShift"),
    ("outlier_detector", "IsolationForest"),
    ("regressor", "ExtraTreesRegressor"),
    ("regressor", "RandomForestRegressor"),
    ("transformer", "LatentDirichletAllocation"),
    ("transformer", "RandomTreesEmbedding"),
}
EVERY = list(coverage.estimators())
# Every other one runs with the quick tests, the rest with the long ones.
NAMED = [
    pytest.param(*each, id="-".join(each[:2]), marks=[pytest.mark.slow] * (i % 2 or each[:2] in SLOW))
    for i, each in enumerate(EVERY)
]


def on_the_page():
    """{(kind, name): (state, remarks)} of the page in docs/."""
    found = {}
    _, *sections = coverage.PAGE.read_text(encoding="utf-8").split("\n## ")
    for section in sections:
        kind = section.split("s: ")[0].lower().replace(" ", "_")
        rows = re.findall(r"^\| (\w+) \| (proven|refused|not fitted) \| (.*) \|$", section, re.MULTILINE)
        found.update({(kind, name): (state, remarks) for name, state, remarks in rows})
    return found


def test_the_page_lists_every_estimator_and_nearly_all_are_proven():
    page = on_the_page()
    assert sorted(page) == sorted((kind, name) for kind, name, _ in EVERY)
    states = [state for (kind, _), (state, _) in page.items() if kind != "transformer"]
    assert "not fitted" not in states
    assert states.count("proven") >= 0.95 * len(states)


def test_the_page_says_why_a_transformer_is_not_proven():
    page = {name: found for (kind, name), found in on_the_page().items() if kind == "transformer"}
    states = [state for state, _ in page.values()]
    assert {name for name, (state, _) in page.items() if state == "not fitted"} == set(coverage.NO_STEP)
    assert all(remarks for state, remarks in page.values() if state != "proven")
    assert states.count("proven") >= 0.75 * (len(states) - states.count("not fitted"))
    for name in (*coverage.TEXT, *coverage.DICTS):
        state, remarks = page[name]
        assert state == "refused"
        assert "takes text or dictionaries" in remarks or name == "DictVectorizer"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name", "made"), NAMED)
def test_an_estimator_does_as_the_page_says(kind, name, made):
    found = coverage.outcome(kind, name, made)
    assert found.state == on_the_page()[kind, name][0], found.detail
