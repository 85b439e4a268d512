"""Any random pipeline becomes an artifact that agrees with it on rows of our own, or is refused with a reason."""

import random
import re
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from tests.support import hostile, pipelines

REFUSAL = re.compile(r"(UnsupportedPipeline|ParityError|ParityFailure): .+(;|\.) .+", re.DOTALL)


def judged(case, path, seed):
    """The verdict on one case; None where scikit-learn cannot fit it. A wrong one fails."""
    fitted = case.fit()
    if fitted is None:
        return None
    found = hostile.verdict(fitted, case.X, path, seed=seed)
    assert found.state != "wrong", f"{found.detail}\n{case!r}"
    if found.state == "refused":
        assert REFUSAL.match(found.detail), f"no reason and remedy in: {found.detail}\n{case!r}"
    else:
        assert found.rows > 0, f"every row was refused by the pipeline itself\n{case!r}"
    return found


def tally(seeds, path):
    """{state: how many} over the cases of some seeds; the seed is part of any failure."""
    states: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for seed in seeds:
        case = pipelines.case(random.Random(seed))
        try:
            found = judged(case, path, seed)
        except Exception as e:
            e.add_note(f"seed {seed}: {case!r}")
            raise
        states[found.state if found else "unfit"] += 1
        if found and found.detail:
            refused[found.detail[:80]] += 1
    print(dict(states), refused.most_common(5))
    return states


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@settings(
    max_examples=5,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
    ],
)
@given(rng=st.randoms(use_true_random=False))
def test_a_random_pipeline_agrees_or_is_refused(rng, tmp_path):
    case = pipelines.case(rng)
    note(repr(case))
    judged(case, tmp_path / "m.onnx", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(100, 1100, 100))
def test_a_hundred_random_pipelines_agree_or_are_refused(start, tmp_path):
    states = tally(range(start, start + 100), tmp_path / "m.onnx")
    assert states["proven"] >= 0.6 * (states["proven"] + states["refused"]) > 0, dict(states)
