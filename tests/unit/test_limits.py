"""Soft and hard limits of the process: what is said, what is done, and that neither is repeated."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.messages import Health
from edge_runtime.core.budget import (
    CPU_SPAN_NS,
    GIVE_UP_NS,
    HARD_ACTIONS,
    STEP_NS,
    EndTrial,
    GiveUp,
    Guard,
    Lighten,
    LimitKept,
    LimitPassed,
    Limits,
    SetBatch,
    Shed,
)

MB = 1_000_000
LIMITS = Limits(rss_soft_bytes=100 * MB, rss_bytes=120 * MB, on_hard="report")


class Watched:
    """A guard with a process whose figures a test sets; time passes by a tick with each look."""

    def __init__(self, limits: Limits, max_batch: int = 0) -> None:
        self.guard = Guard(limits, max_batch=max_batch)
        self.health = Health(uptime_ns=1)

    def __call__(
        self, rss_mb: float = 0, *, after_ns: int = 250_000_000, on_trial: bool = False, **more: int
    ):
        uptime_ns = self.health.uptime_ns + after_ns
        self.health = replace(self.health, rss_bytes=int(rss_mb * MB), uptime_ns=uptime_ns, **more)
        return self.guard.observe(self.health, on_trial=on_trial)


def said(decisions: list[object]) -> list[tuple[str, str]]:
    return [(type(d).__name__, d.limit) for d in decisions if isinstance(d, LimitPassed | LimitKept)]


def done(decisions: list[object]) -> list[object]:
    return [d for d in decisions if not isinstance(d, LimitPassed | LimitKept)]


def test_a_soft_limit_is_said_once_and_kept_again_once():
    watched = Watched(LIMITS)
    assert watched(100.0) == []
    (passed,) = watched(100.1)
    assert passed == LimitPassed("rss_soft", "RSS of 100.1 MB is above the soft limit of 100.0 MB")
    assert watched.guard.over == "soft"
    for wobble in (99.0, 101.0, 95.1, 110.0):
        assert watched(wobble) == []
    assert watched(94.9) == [LimitKept("rss_soft", "RSS is 94.9 MB again")]
    assert watched.guard.over == ""
    assert watched(94.0) == []
    assert said(watched(101.0)) == [("LimitPassed", "rss_soft")]


def test_a_hard_limit_says_both_when_both_are_passed_at_once():
    watched = Watched(LIMITS)
    decisions = watched(121.0)
    assert said(decisions) == [("LimitPassed", "rss_soft"), ("LimitPassed", "rss")]
    assert done(decisions) == []
    assert watched.guard.over == "hard"
    assert watched(200.0, after_ns=10 * STEP_NS) == []


def test_reporting_does_nothing_else_however_long_it_lasts():
    watched = Watched(LIMITS)
    watched(121.0)
    for _ in range(5):
        assert watched(500.0, on_trial=True, after_ns=STEP_NS) == []
    decisions = watched(1.0)
    assert said(decisions) == [("LimitKept", "rss"), ("LimitKept", "rss_soft")]
    assert done(decisions) == []


def test_shedding_lasts_until_the_soft_limit_is_kept():
    watched = Watched(replace(LIMITS, on_hard="shed"))
    assert done(watched(121.0)) == [Shed(on=True)]
    for rss_mb in (130.0, 119.0, 101.0, 100.0, 121.0):
        assert watched(rss_mb, after_ns=STEP_NS) == []
    decisions = watched(99.9)
    assert decisions == [Shed(on=False), LimitKept("rss", "RSS is 99.9 MB again")]
    assert watched.guard.over == "soft"  # not calm yet: 95 is
    assert done(watched(121.0)) == [Shed(on=True)]


def test_batches_shrink_step_by_step_and_then_rows_are_shed():
    watched = Watched(replace(LIMITS, on_hard="smaller_batch"), max_batch=4)
    assert done(watched(121.0)) == [SetBatch(2)]
    assert watched(121.0) == []  # it is given time to help
    assert watched(121.0, after_ns=STEP_NS) == [SetBatch(1)]
    assert watched(110.0, after_ns=STEP_NS) == []  # below the hard limit nothing more is needed
    assert watched(121.0, after_ns=STEP_NS) == [Shed(on=True)]
    assert watched(121.0, after_ns=STEP_NS) == []
    assert done(watched(90.0)) == [Shed(on=False), SetBatch(4)]
    assert done(watched(121.0)) == [SetBatch(2)]


def test_batches_without_a_limit_get_one_and_lose_it_again():
    watched = Watched(replace(LIMITS, on_hard="smaller_batch"))
    assert done(watched(121.0)) == [SetBatch(Guard.UNBOUNDED // 2)]
    assert done(watched(90.0)) == [SetBatch(0)]


def test_a_trial_is_rolled_back_and_rows_are_shed_only_if_that_did_not_help():
    watched = Watched(replace(LIMITS, on_hard="roll_back"))
    assert done(watched(121.0, on_trial=True)) == [Lighten()]
    assert watched(122.0, on_trial=True) == [EndTrial("RSS of 122.0 MB is above the hard limit of 120.0 MB")]
    assert watched(125.0, on_trial=True) == []
    assert watched(125.0, on_trial=True, after_ns=STEP_NS) == [Shed(on=True)]  # a trial is not ended twice
    assert done(watched(90.0)) == [Shed(on=False)]


@pytest.mark.parametrize("action", ["shed", "smaller_batch", "roll_back"])
def test_whatever_the_action_a_trial_ends_before_rows_suffer(action):
    """Else a candidate that leaks is never judged: rows that are shed give no sample."""
    watched = Watched(replace(LIMITS, on_hard=action), max_batch=4)
    assert done(watched(121.0, on_trial=True)) == [Lighten()]
    assert watched(121.0, on_trial=True) == [EndTrial("RSS of 121.0 MB is above the hard limit of 120.0 MB")]
    after = watched(121.0, after_ns=STEP_NS)
    assert after == [SetBatch(2)] if action == "smaller_batch" else [Shed(on=True)]


def test_a_trial_that_only_its_comparison_made_large_goes_on():
    watched = Watched(replace(LIMITS, on_hard="shed"))
    assert done(watched(121.0, on_trial=True)) == [Lighten()]
    assert done(watched(90.0, on_trial=True)) == []
    assert done(watched(121.0, on_trial=True)) == [Lighten()]


def test_a_trial_that_ends_by_itself_meanwhile_leaves_the_usual_action():
    watched = Watched(replace(LIMITS, on_hard="shed"))
    assert done(watched(121.0, on_trial=True)) == [Lighten()]
    assert watched(121.0) == [Shed(on=True)]


def test_a_candidate_does_not_answer_for_a_limit_that_was_passed_before_its_trial():
    watched = Watched(replace(LIMITS, on_hard="shed"))
    assert done(watched(121.0)) == [Shed(on=True)]
    assert watched(121.0, on_trial=True, after_ns=STEP_NS) == []


def test_a_second_trial_ends_before_rows_are_shed_although_the_limit_was_not_kept_in_between():
    watched = Watched(replace(LIMITS, on_hard="roll_back"))
    assert done(watched(121.0, on_trial=True)) == [Lighten()]
    assert watched(122.0, on_trial=True) == [EndTrial("RSS of 122.0 MB is above the hard limit of 120.0 MB")]
    assert watched(115.0) == []
    assert watched(115.0, on_trial=True, after_ns=STEP_NS) == []
    assert watched(121.0, on_trial=True, after_ns=STEP_NS) == [Lighten()]
    assert watched(121.0, on_trial=True) == [EndTrial("RSS of 121.0 MB is above the hard limit of 120.0 MB")]


def test_a_limit_that_is_only_reported_ends_no_trial():
    assert done(Watched(replace(LIMITS, on_hard="report"))(121.0, on_trial=True)) == []


def test_without_a_trial_to_roll_back_rows_are_shed():
    watched = Watched(replace(LIMITS, on_hard="roll_back"))
    assert done(watched(121.0, on_trial=False)) == [Shed(on=True)]


def test_only_a_soft_limit_never_acts():
    watched = Watched(Limits(rss_soft_bytes=100 * MB, on_hard="shed"))
    assert done(watched(10_000.0)) == []


def test_a_hard_limit_alone_is_released_below_itself():
    watched = Watched(Limits(rss_bytes=100 * MB, on_hard="shed"))
    assert done(watched(101.0)) == [Shed(on=True)]
    assert watched(99.0) == []
    assert done(watched(94.0)) == [Shed(on=False)]


def test_no_limits_and_unknown_figures_say_nothing():
    assert Watched(Limits())(1e6, temperature_mc=200_000, cpu_ns=10**15) == []
    every = Limits(rss_bytes=1, cpu_soft_ppm=1, temperature_soft_mc=1)
    assert Guard(every).observe(Health(), on_trial=False) == []


def test_heat_is_said_once_and_over_three_degrees_below():
    watched = Watched(Limits(temperature_soft_mc=80_000))
    assert watched(temperature_mc=80_000) == []
    assert watched(temperature_mc=80_500) == [
        LimitPassed("temperature_soft", "80.5 °C is above the soft limit of 80.0 °C")
    ]
    for wobble in (79_000, 81_000, 77_000):
        assert watched(temperature_mc=wobble) == []
    assert watched(temperature_mc=76_900) == [LimitKept("temperature_soft", "76.9 °C again")]


def test_work_is_judged_over_a_minute():
    watched = Watched(Limits(cpu_soft_ppm=500_000))
    assert watched(cpu_ns=0) == []
    assert watched(cpu_ns=10**9, after_ns=10**9) == []  # a busy second
    rest = CPU_SPAN_NS - 10**9
    assert watched(cpu_ns=10**9, after_ns=rest) == []
    assert watched(cpu_ns=10**9 + 48 * 10**9, after_ns=CPU_SPAN_NS) == [
        LimitPassed("cpu_soft", "80.0 % of a core is above the soft limit of 50.0 %")
    ]
    assert watched(cpu_ns=49 * 10**9 + 29 * 10**9, after_ns=CPU_SPAN_NS) == []  # 48 %: not calm yet
    assert watched(cpu_ns=78 * 10**9, after_ns=CPU_SPAN_NS) == [
        LimitKept("cpu_soft", "0.0 % of a core again")
    ]


@pytest.mark.parametrize(
    ("declared", "group", "soft", "hard"),
    [
        ((0, 0), 0, 0, 0),
        ((0, 0), 200 * MB, 162 * MB, 180 * MB),
        ((0, 100 * MB), 200 * MB, 90 * MB, 100 * MB),
        ((80 * MB, 100 * MB), 0, 80 * MB, 100 * MB),
        ((0, 100 * MB), 0, 90 * MB, 100 * MB),
        ((80 * MB, 190 * MB), 200 * MB, 80 * MB, 180 * MB),
        ((185 * MB, 190 * MB), 200 * MB, 162 * MB, 180 * MB),
        ((50 * MB, 0), 200 * MB, 50 * MB, 180 * MB),
        ((50 * MB, 0), 0, 50 * MB, 0),
    ],
)
def test_the_kernels_limit_is_never_the_first(declared, group, soft, hard):
    limits = Limits(rss_soft_bytes=declared[0], rss_bytes=declared[1], on_hard="shed").within(group)
    assert (limits.rss_soft_bytes, limits.rss_bytes, limits.on_hard) == (soft, hard, "shed")


def test_limits_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="one of report, shed, smaller_batch, roll_back, not 'explode'"):
        Limits(on_hard="explode")
    with pytest.raises(ConfigError, match=r"soft limit of 2\.0 MB is above the hard limit of 1\.0 MB"):
        Limits(rss_soft_bytes=2 * MB, rss_bytes=MB)


@given(
    action=st.sampled_from(HARD_ACTIONS),
    batch=st.integers(0, 64),
    looks=st.lists(st.tuples(st.integers(1, 200), st.booleans(), st.integers(0, 2 * STEP_NS)), max_size=60),
)
def test_what_is_passed_is_kept_again_and_what_is_done_is_undone(action, batch, looks):
    watched = Watched(replace(LIMITS, on_hard=action), max_batch=batch)
    passed: set[str] = set()
    shedding, rows = False, batch
    for rss_mb, on_trial, after_ns in [*looks, (1, False, 1)]:
        before = bool(passed)
        for decision in watched(rss_mb, on_trial=on_trial, after_ns=after_ns):
            match decision:
                case LimitPassed():
                    assert decision.limit not in passed
                    passed.add(decision.limit)
                case LimitKept():
                    passed.remove(decision.limit)
                case Shed():
                    assert decision.on != shedding
                    shedding = decision.on
                case SetBatch():
                    assert decision.rows != rows
                    rows = decision.rows
                case EndTrial():
                    assert on_trial
                    assert "rss" in passed
        assert ("rss" in passed) or (not shedding and rows == batch), "an action outlives its reason"
        assert watched.guard.over == ("hard" if "rss" in passed else "soft" if passed else "")
        assert before or rss_mb <= 100 or passed
    assert not passed
    assert not shedding
    assert rows == batch


def test_a_process_that_sheds_in_vain_gives_up():
    watched = Watched(replace(LIMITS, on_hard="shed"))
    assert done(watched(121.0)) == [Shed(on=True)]
    assert done(watched(121.0, after_ns=GIVE_UP_NS - 1)) == []
    (given_up,) = done(watched(121.0, after_ns=1))
    assert isinstance(given_up, GiveUp)
    assert (
        given_up.reason
        == "RSS of 121.0 MB is above the hard limit of 120.0 MB after 10 minutes without a row"
    )
    assert done(watched(1.0)) == [Shed(on=False)]
    assert done(watched(121.0)) == [Shed(on=True)]
