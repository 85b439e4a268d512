"""The data plane: answers, refusals, counting, windows and swaps."""

import gc
import pickle
import threading
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_runtime import serving
from edge_runtime.beside import Incumbent
from edge_runtime.contract.errors import ArtifactError, BudgetExceeded, InputError
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.manifest import Feature, agrees
from edge_runtime.contract.profile import Binner, class_counts
from edge_runtime.engine import Block, Engine
from edge_runtime.runtime import Runtime
from edge_runtime.serving import RING_ROWS
from tests.support.tiny_models import classifier, regressor

TINY = classifier(missing=("b",))


class Clock:
    """Nanoseconds that pass by a fixed step at each look."""

    def __init__(self, step_ns=1000):
        self.now_ns = 0
        self.step_ns = step_ns

    def __call__(self):
        self.now_ns += self.step_ns
        return self.now_ns


def built(tiny=TINY, **options) -> Any:
    return Runtime(tiny.artifact, **options)


def rows_of(tiny, n, seed=7):
    return np.random.default_rng(seed).normal(size=(n, len(tiny.features))).astype(np.float32)


def counted(tiny, rows):
    """The profile of ``rows`` as the engine answers them, counted in one go."""
    manifest = tiny.manifest
    labels, scores = Engine(tiny.artifact).run(rows)
    binner = Binner(tiny.reference.spec, probabilities=manifest.probabilities)
    binner.observe(rows, np.zeros(len(rows), np.int64) if labels is None else labels, scores)
    return binner.take()


# ── answers ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "labels", [("low", "mid", "high"), (3, 1, 2), (0.5, 1.5, 2.5), (True, False, "both")]
)
def test_one_row_is_answered_in_the_pipelines_own_labels(labels):
    tiny = classifier(labels=labels)
    runtime = built(tiny)
    for row in rows_of(tiny, 20):
        found = runtime.predict(row)
        (index,), (score,) = tiny.answer(row[None])
        assert found.raw == index
        assert type(found.raw) is int
        assert found.label == labels[index]
        assert type(found.label) is type(labels[index])
        assert found.score.shape == (3,)
        assert agrees(found.score, score).all()
        assert found.model == tiny.digest


@pytest.mark.parametrize(
    "labels", [("low", "mid", "high"), (3, 1, 2), (0.5, 1.5, 2.5), (True, False, "both")]
)
def test_a_batch_is_answered_in_arrays(labels):
    tiny = classifier(labels=labels)
    rows = rows_of(tiny, 20)
    found = built(tiny).predict(rows)
    indices, scores = tiny.answer(rows)
    assert found.raw.tolist() == indices.tolist()
    assert found.label.tolist() == [labels[i] for i in indices]
    assert [type(label) for label in found.label.tolist()] == [type(labels[i]) for i in indices]
    assert agrees(found.score, scores).all()


def test_a_regressor_has_a_score_and_no_label():
    tiny = regressor()
    rows = rows_of(tiny, 3)
    runtime = built(tiny)
    one, many = runtime.predict(rows[0]), runtime.predict(rows)
    assert (one.label, one.raw, many.label, many.raw) == (None, None, None, None)
    assert agrees(one.score, tiny.answer(rows)[1][0]).all()
    assert agrees(many.score, tiny.answer(rows)[1]).all()
    assert runtime.take_window().rows == 4


def test_every_way_to_pass_a_row_gives_the_same_answer():
    row = np.array([0.5, -1.25, 2.0], np.float32)
    plain = [0.5, -1.25, 2.0]
    named = {"c": 2, "a": np.float64(0.5), "b": np.float32(-1.25)}
    runtime = built()
    wanted = runtime.predict(row).score.tobytes()
    other_dtype = pickle.loads(pickle.dumps(np.zeros(3, np.float32)))
    other_dtype[:] = row
    strided = np.zeros((3, 2), np.float32)
    strided[:, 1] = row
    single = [
        row.astype(np.float64),
        plain,
        tuple(plain),
        named,
        row.astype(object),
        other_dtype,
        strided[:, 1],
    ]
    for one in single:
        found = runtime.predict(one)
        assert found.score.shape == (3,)
        assert found.score.tobytes() == wanted
    batches = [
        row[None],
        [row],
        [plain],
        [named],
        (tuple(plain),),
        np.array([plain], object),
        row[None].astype(">f4"),
    ]
    for batch in batches:
        found = runtime.predict(batch)
        assert found.score.shape == (1, 3)
        assert found.score.tobytes() == wanted
    assert runtime.take_window().rows == 1 + len(single) + len(batches)


def test_whole_numbers_and_truth_values_are_numbers():
    runtime = built()
    wanted = runtime.predict(np.array([1, 0, 2], np.float32)).score.tobytes()
    for row in ([True, 0, np.uint8(2)], np.array([1, 0, 2], np.int8), [np.bool_(True), False, 2.0]):
        assert runtime.predict(row).score.tobytes() == wanted


@pytest.mark.parametrize("nothing", [[], (), np.zeros((0, 3), np.float32), np.zeros((0, 3))])
def test_no_rows_are_answered_with_no_rows(nothing):
    runtime = built()
    found = runtime.predict(nothing)
    assert found.score.shape == (0, 3)
    assert found.raw.shape == found.label.shape == (0,)
    seen = runtime.take_window()
    assert seen.rows == seen.latency.count == 0


def test_the_caller_owns_the_arrays_on_both_sides():
    runtime = built()
    row = rows_of(TINY, 1)[0]
    first = runtime.predict(row)
    kept = first.score.copy()
    row[:] = 100.0
    for _ in range(2 * RING_ROWS):
        runtime.predict(row)
    assert np.array_equal(first.score, kept)
    assert first.score.flags.owndata
    first.score[:] = 9.0
    seen = runtime.take_window()
    row[:] = rows_of(TINY, 1)[0]
    assert seen.profile == counted(
        TINY, np.vstack([rows_of(TINY, 1), np.full((2 * RING_ROWS, 3), 100, np.float32)])
    )


# ── refusals ───────────────────────────────────────────────────────────────────────────────────────────

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("rows", "reason", "message"),
    [
        (np.zeros(2, np.float32), "width", r"shape \(2,\); \(n, 3\) is needed"),
        (np.zeros((2, 4)), "width", r"shape \(2, 4\)"),
        (np.zeros((1, 1, 3)), "width", "shape"),
        (np.zeros(()), "width", "shape"),
        ([1.0, 2.0], "width", "2 values; the model has 3 features"),
        ([[1, 2, 3], [1, 2]], "width", "row 1: 2 values"),
        (
            np.array([NAN, 0, 0], np.float32),
            "missing",
            "feature 'a' is missing and the model does not accept that",
        ),
        (np.array([0, 0, NAN]), "missing", "feature 'c' is missing"),
        ({"a": 1, "b": 2}, "missing", "feature 'c' is missing"),
        ({"a": None, "c": 2}, "missing", "feature 'a' is missing"),
        ([[1, 2, 3], [1, NAN, 3], [NAN, 2, 3]], "missing", "row 2: feature 'a'"),
        (
            np.array([0, INF, 0], np.float32),
            "non_finite",
            "feature 'b' is inf; a finite float32 number is needed",
        ),
        (np.array([0, 0, -INF], np.float32), "non_finite", "feature 'c' is -inf"),
        (np.array([INF, -INF, 0], np.float32), "non_finite", "feature 'a' is inf"),
        ([0, 1e39, 0], "non_finite", "feature 'b' is inf"),
        (np.array([0, 1e300, 0]), "non_finite", "feature 'b' is inf"),
        ([0, 10**400, 0], "non_finite", "feature 'b' is inf"),
        ({"a": 1, "d": 2}, "unknown_feature", "the model has no feature 'd'"),
        ([{"a": 1, "c": 1}, {"a ": 1}], "unknown_feature", r"row 1: .* 'a ' \(did you mean 'a'\?\)"),
        (["1", 2, 3], "type", "feature 'a' is str '1', not a number"),
        ([1j, 2, 3], "type", "feature 'a' is complex"),
        ([[1, 2, 3], "abc"], "type", "row 1: str is not a row"),
        ("abc", "type", "str is not a row; pass an array"),
        (3.0, "type", "float is not a row"),
        (np.array(["1", "2", "3"]), "type", "an array of <U1"),
        (np.zeros(3, complex), "type", "an array of complex128"),
        (np.ma.masked_array([1.0, 2.0, 3.0], [True, False, False]), "type", r"pass rows\.filled"),
    ],
)
def test_a_row_that_breaks_the_schema_is_refused_counted_and_named(rows, reason, message):
    runtime = built()
    with pytest.raises(InputError, match=message) as refused:
        runtime.predict(rows)
    assert refused.value.reason == reason
    assert isinstance(refused.value, ValueError)
    seen = runtime.take_window()
    held = len(rows) if isinstance(rows, list) and isinstance(rows[0], list | dict) else 1
    held = len(rows) if isinstance(rows, np.ndarray) and rows.ndim > 1 else held
    assert seen.refused == ((reason, held),)
    assert seen.rows == seen.failed == seen.latency.count == 0


def test_a_refused_row_leaves_no_trace_in_the_answers():
    runtime = built()
    good, bad = rows_of(TINY, 1)[0], np.array([INF, 0, 0], np.float32)
    wanted = runtime.predict(good).score.tobytes()
    for _ in range(3):
        with pytest.raises(InputError):
            runtime.predict(bad)
        assert runtime.predict(good).score.tobytes() == wanted
    seen = runtime.take_window()
    assert seen.profile == counted(TINY, np.vstack([good] * 4))
    assert seen.refused == (("non_finite", 3),)
    assert runtime.take_window().refused == ()


def test_missing_values_are_served_where_the_model_accepts_them():
    runtime = built()
    row = np.array([0.0, NAN, 1.0], np.float32)
    for one in (row, {"a": 0, "c": 1}, [0, None, 1]):
        assert np.isnan(runtime.predict(one).score).all()  # what this linear model makes of NaN
    assert (
        runtime.take_window().profile.counts[TINY.reference.spec.offsets[1] :][
            TINY.reference.spec.features[1].cells
        ]
        == 3
    )


@pytest.mark.filterwarnings("error")
def test_refusing_warns_of_nothing():
    runtime = built()
    for bad in ([INF, -INF, 0], [NAN, INF, 0], [3e38, 3e38, INF]):
        with pytest.raises(InputError):
            runtime.predict(np.array(bad, np.float32))
    runtime.predict(np.array([3e38, -3e38, 3e38], np.float32))


def test_a_graph_that_breaks_is_counted_as_failed():
    runtime = built()
    rows = rows_of(TINY, 4)
    serves: Any = runtime._serving
    row, _, *after = good = serves.hot

    def fail():
        raise Block.failures[1]("boom")

    def answer_seven():
        serves.raw[0] = 7

    serves.hot = (row, fail, *after)
    with pytest.raises(ArtifactError, match=f"model {TINY.digest}: the graph failed on one row: boom"):
        runtime.predict(rows[0])
    with pytest.raises(InputError, match="'a' is missing"):
        runtime.predict(np.array([np.nan, 0, 0], np.float32))  # the row is to blame, not the graph
    serves.hot = (row, answer_seven, *after)
    with pytest.raises(ArtifactError, match="answered class 7; the manifest has 3"):
        runtime.predict(rows[0])
    serves.hot = good
    runtime.predict(rows[0])
    assert runtime.trial_stats().failed == 2
    seen = runtime.take_window()
    assert (seen.failed, seen.rows) == (2, 1)
    assert runtime.trial_stats().failed == 2


def test_a_batch_that_breaks_is_counted_by_its_rows(monkeypatch):
    runtime = built()

    def fail(rows, **_):
        raise BudgetExceeded("no memory")

    monkeypatch.setattr(runtime.engine, "run", fail)
    with pytest.raises(BudgetExceeded):
        runtime.predict(rows_of(TINY, 5))
    assert runtime.take_window().failed == 5


# ── counting ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [1, RING_ROWS - 1, RING_ROWS, RING_ROWS + 1, 3 * RING_ROWS + 5])
def test_a_window_is_what_was_predicted(n):
    runtime = built(clock_ns=Clock())
    rows = rows_of(TINY, n)
    rows[1::3] = rows[::3][: len(rows[1::3])]  # repeats
    for row in rows:
        runtime.predict(row)
    assert runtime.rows == n
    seen = runtime.take_window()
    assert seen.profile == counted(TINY, rows)
    assert seen.rows == n
    assert seen.latency.count == n
    assert seen.latency.sum_ns == 1000 * n
    assert runtime.rows == runtime.take_window().rows == 0


def test_single_rows_and_batches_are_counted_in_the_order_they_came():
    runtime = built()
    row = rows_of(TINY, 1)[0]
    runtime.predict(row)
    runtime.predict(np.vstack([row, row + 1]))
    runtime.predict(row + 1)
    seen = runtime.take_window()
    assert seen.profile == counted(TINY, np.vstack([row, row, row + 1, row + 1]))
    assert seen.latency.count == 3  # calls


def test_the_row_before_a_window_is_remembered():
    runtime = built()
    row = rows_of(TINY, 1)[0]
    runtime.predict(row)
    runtime.take_window()
    runtime.predict(row)
    profile = runtime.take_window().profile
    spec = TINY.reference.spec
    assert [profile.counts[spec.offsets[j + 1] - 1] for j in range(3)] == [1, 1, 1]


def test_truth_is_counted_by_window():
    runtime = built()
    runtime.record_truth(3, 2)
    runtime.record_truth(1, 1)
    seen = runtime.take_window()
    assert (seen.labelled, seen.correct) == (4, 3)
    assert runtime.take_window().labelled == 0
    for labelled, correct in ((1, 2), (-1, -1), (1, -1)):
        with pytest.raises(ValueError, match="labelled rows"):
            runtime.record_truth(labelled, correct)


def test_a_wide_row_gets_a_short_ring(monkeypatch):
    assert built()._serving.size == RING_ROWS
    monkeypatch.setattr(serving, "RING_BYTES", 1000)
    runtime = built()
    assert runtime._serving.size == 1000 // 32  # label, row of 3, scores of 3
    rows = rows_of(TINY, 85)
    for row in rows:
        runtime.predict(row)
    assert runtime.take_window().profile == counted(TINY, rows)


# ── trials ─────────────────────────────────────────────────────────────────────────────────────────────


def test_trial_statistics_outlive_windows():
    runtime = built(cpu_clock_ns=Clock(70))
    rows = rows_of(TINY, RING_ROWS + 10)
    runtime.predict(rows[0])
    assert runtime.trial_stats().cpu == LatencyHistogram()  # not asked for
    runtime.measure_cpu = True
    for row in rows:
        runtime.predict(row)
    runtime.take_window()
    runtime.predict(rows[:7])
    stats = runtime.trial_stats()
    assert stats.predictions == 1 + len(rows) + 7
    assert stats.cpu.count == len(rows) + 1
    assert stats.cpu.sum_ns == 70 * len(rows) + 70 // 7
    assert stats == runtime.trial_stats()
    runtime.measure_cpu = False
    runtime.predict(rows[0])
    assert runtime.trial_stats().cpu == stats.cpu


def test_asking_for_cpu_time_in_the_middle_of_a_call_gives_no_wild_sample():
    runtime = built()
    serves: Any = runtime._serving
    row, run, *after = serves.hot

    def run_while_another_thread_asks():
        runtime.measure_cpu = True
        run()

    serves.hot = (row, run_while_another_thread_asks, *after)
    runtime.predict(rows_of(TINY, 1)[0])
    assert runtime.trial_stats().cpu.count == 0


# ── swaps ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_swap_ends_the_old_models_window():
    old, new = TINY, classifier(missing=("b",), seed=1)
    runtime = built(old)
    rows = rows_of(old, 5)
    runtime.measure_cpu = True
    for row in rows:
        runtime.predict(row)
    runtime.record_truth(2, 1)
    seen = runtime.swap(Engine(new.artifact))
    assert seen.digest == old.digest
    assert seen.profile == counted(old, rows)
    assert (seen.labelled, seen.correct) == (2, 1)
    assert runtime.digest == runtime.engine.digest == new.digest
    assert runtime.trial_stats().predictions == runtime.trial_stats().cpu.count == 0
    found = runtime.predict(rows[0])
    assert found.model == new.digest
    assert agrees(found.score, new.answer(rows[:1])[1][0]).all()
    seen = runtime.take_window()
    assert (seen.digest, seen.rows, seen.labelled) == (new.digest, 1, 0)


@pytest.mark.parametrize("names", [("a", "c", "b"), ("a", "b"), ("a", "b", "d")])
def test_a_model_with_other_features_is_not_swapped_in(names):
    runtime = built()
    with pytest.raises(ArtifactError, match=r"this stream carries \['a', 'b', 'c'\]: build a new Runtime"):
        runtime.swap(Engine(classifier(names).artifact))
    assert runtime.digest == TINY.digest
    runtime.predict(rows_of(TINY, 1)[0])
    assert runtime.take_window().rows == 1


def test_the_new_model_decides_what_may_be_missing():
    runtime = built()
    row = np.array([NAN, 0, 0], np.float32)
    with pytest.raises(InputError):
        runtime.predict(row)
    runtime.swap(Engine(classifier(missing=("a",), seed=1).artifact))
    assert np.isnan(runtime.predict(row).score).all()


def test_the_old_models_memory_is_let_go():
    runtime = built()
    session = weakref.ref(runtime.engine._session)
    ring = weakref.ref(runtime._serving._block.memory)
    runtime.predict(rows_of(TINY, 1)[0])
    runtime.swap(Engine(classifier(seed=1).artifact))
    gc.collect()
    assert session() is None
    assert ring() is None


def test_swapping_fails_no_prediction_and_counts_each_for_the_model_that_answered():
    models = [classifier(missing=("b",), seed=seed) for seed in range(3)]
    answers = {model.digest: model for model in models}
    runtime = built(models[0])
    rows = rows_of(TINY, 16)
    wanted = {digest: model.answer(rows)[1] for digest, model in answers.items()}
    stop = threading.Event()
    failures: list[str] = []
    served: list[dict[str, int]] = [{} for _ in range(4)]

    def work(mine):
        while not stop.is_set():
            for i in range(len(rows)):
                try:
                    found = runtime.predict(rows[i] if i % 4 else rows[i : i + 1])
                except Exception as e:  # noqa: BLE001 (any failure at all is what the test looks for)
                    failures.append(repr(e))
                    return
                if not agrees(found.score.reshape(-1), wanted[found.model][i]).all():
                    failures.append(f"row {i} answered by another model than {found.model}")
                mine[found.model] = mine.get(found.model, 0) + 1

    threads = [threading.Thread(target=work, args=(mine,)) for mine in served]
    for thread in threads:
        thread.start()
    seen = [runtime.swap(Engine(models[k % 3].artifact)) for k in range(1, 25)]
    stop.set()
    for thread in threads:
        thread.join()
    seen.append(runtime.take_window())
    assert not failures
    counts: dict[str, int] = {}
    for window in seen:
        assert window.latency.count == window.rows
        assert window.profile.check(answers[window.digest].reference.spec) is window.profile
        counts[window.digest] = counts.get(window.digest, 0) + window.rows
    total: dict[str, int] = {}
    for mine in served:
        for digest, n in mine.items():
            total[digest] = total.get(digest, 0) + n
    assert {d: n for d, n in counts.items() if n} == total
    assert len(total) == 3, "every model must have answered for the test to mean something"


def test_class_counts_follow_the_labels():
    runtime = built()
    rows = rows_of(TINY, 40)
    labels = [runtime.predict(row).raw for row in rows]
    profile = runtime.take_window().profile
    assert class_counts(TINY.reference.spec, profile).tolist() == [labels.count(k) for k in range(3)]


def test_an_incumbent_is_timed_on_every_eighth_row_instead_of_the_candidate():
    runtime = built(cpu_clock_ns=Clock())
    runtime.measure_cpu = True
    runtime.incumbent = Incumbent(Engine(TINY.artifact))
    for row in rows_of(TINY, 80):
        runtime.predict(row)
    stats = runtime.trial_stats()
    assert (stats.predictions, stats.cpu.count, stats.incumbent_cpu.count) == (80, 70, 10)


def test_an_incumbent_that_fails_costs_no_prediction():
    runtime = built()
    runtime.measure_cpu = True
    runtime.incumbent = Incumbent(Engine(TINY.artifact))
    runtime.incumbent.engine.close()
    for row in rows_of(TINY, 20):
        runtime.predict(row)
    stats = runtime.trial_stats()
    assert (runtime.incumbent.timed, stats.predictions, stats.failed) == (False, 20, 0)
    assert (stats.cpu.count, stats.incumbent_cpu.count) == (20, 0)


STRICT = replace(
    classifier(), features=(Feature(name="a"), Feature(name="b", low=-5.0, high=5.0), Feature(name="c"))
)
ROW = np.clip(rows_of(TINY, 1)[0], -4.0, 4.0)
FAR = np.array([ROW[0], 9.0, ROW[2]], np.float32)
NAMED = dict(zip("abc", ROW.tolist(), strict=True))


def beside(candidate, incumbent=TINY) -> Any:
    """A runtime with ``candidate`` on trial."""
    runtime = built(candidate)
    runtime.measure_cpu, runtime.incumbent = True, Incumbent(Engine(incumbent.artifact))
    return runtime


@pytest.mark.parametrize(
    ("rows", "alone"),
    [
        (FAR, 1),
        (FAR.astype(np.float64), 1),
        (FAR.tolist(), 1),
        ({**NAMED, "b": 9.0}, 1),
        (np.stack([ROW, FAR, ROW]), 1),  # the call is refused, for one of its rows
        ([{**NAMED, "b": 9.0}, NAMED, {**NAMED, "b": -9.0}], 1),
        (np.full_like(ROW, np.nan), 0),  # the incumbent, too, refuses
        (np.stack([FAR, np.full_like(ROW, np.nan)]), 0),
        (ROW[:-1], 0),
        ({**NAMED, "d": 1.0}, 0),
        ("no row", 0),
    ],
)
def test_rows_that_only_the_candidate_refuses_are_counted(rows, alone):
    runtime = beside(STRICT)
    runtime.predict(ROW)
    for _ in range(2):
        with pytest.raises(InputError):
            runtime.predict(rows)
    assert runtime.trial_stats().refused_alone == 2 * alone
    runtime.measure_cpu = False
    with pytest.raises(InputError):
        runtime.predict(rows)
    assert runtime.trial_stats().refused_alone == 2 * alone, "nobody is on trial any more"
    runtime.swap(Engine(TINY.artifact))
    assert runtime.trial_stats().refused_alone == 0


def test_rows_answered_with_nan_count_where_the_incumbent_has_a_number():
    """A candidate whose manifest allows NaN, on rows that the model before it answers."""
    hollow = replace(TINY, bias=np.full(3, np.nan, np.float32), refuses=False)
    runtime = beside(hollow)
    for rows in (ROW, np.stack([ROW, ROW])):
        assert np.isnan(runtime.predict(rows).score).all()
    assert runtime.trial_stats().refused_alone == 2
    runtime = beside(TINY)
    runtime.predict(np.array([0.0, np.nan, 0.0], np.float32))  # so does the incumbent
    assert runtime.trial_stats().refused_alone == 0


def test_rows_that_are_shed_are_not_held_against_the_candidate():
    runtime = beside(TINY)
    runtime.shedding = True
    with pytest.raises(BudgetExceeded):
        runtime.predict(ROW)
    assert runtime.trial_stats().refused_alone == 0


def test_an_incumbent_that_fails_answers_nothing_and_can_be_timed_no_more():
    runtime = beside(STRICT)
    runtime.incumbent.engine.close()
    with pytest.raises(InputError):
        runtime.predict(FAR)
    for _ in range(20):
        runtime.predict(ROW)
    stats = runtime.trial_stats()
    assert (stats.refused_alone, stats.failed, stats.cpu.count, stats.incumbent_cpu.count) == (0, 0, 20, 0)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("both", [False, True])
def test_a_call_that_both_models_fail_is_not_the_candidates_failure(monkeypatch, n, both):
    """A batch that is too large for the memory left, say."""
    runtime = beside(TINY, replace(TINY, name="other"))
    rows = rows_of(TINY, n)

    def too_large(*_: Any, **__: Any) -> Any:
        raise BudgetExceeded(f"{n} rows do not fit into memory")

    monkeypatch.setattr(runtime.engine, "run", too_large)
    if both:
        monkeypatch.setattr(runtime.incumbent.engine, "run", too_large)
    with pytest.raises(BudgetExceeded):
        runtime.predict(rows)
    assert runtime.trial_stats().failed == (0 if both else n)
    assert runtime.take_window().failed == n, "the window tells of them in any case"


def test_an_incumbent_that_is_let_go_is_not_compared_any_more():
    runtime = beside(STRICT)
    runtime.let_incumbent_go()
    with pytest.raises(InputError):
        runtime.predict(FAR)
    assert runtime.trial_stats().refused_alone == 0


def test_an_incumbent_that_takes_too_long_costs_no_prediction():
    class Slow(Engine):
        def run(self, *_: Any, **__: Any) -> Any:
            raise BudgetExceeded("a run took longer than 1 s and was ended")

    runtime = built()
    runtime.measure_cpu = True
    runtime.incumbent = Incumbent(Slow(TINY.artifact))
    rows = rows_of(TINY, 20)
    assert [runtime.predict(row).raw for row in rows] == [built().predict(row).raw for row in rows]
    stats = runtime.trial_stats()
    assert (runtime.incumbent.timed, stats.predictions, stats.failed) == (False, 20, 0)
    assert (stats.cpu.count, stats.incumbent_cpu.count) == (20, 0)


# ── time, load and large batches ───────────────────────────────────────────────────────────────────────


def test_waiting_is_counted_apart_from_answering():
    clock = Clock(1000)
    runtime = built(clock_ns=clock)
    rows = rows_of(TINY, 4)
    runtime.predict(rows[0])
    runtime.predict(rows)
    assert runtime.take_window().queueing == LatencyHistogram()  # nobody waited
    runtime.record_queueing([5, 0, 3000])
    seen = runtime.take_window()
    assert (seen.queueing.count, seen.queueing.zero, seen.queueing.sum_ns) == (3, 1, 3005)
    assert seen.latency.count == 0
    assert runtime.take_window().queueing == LatencyHistogram()


@pytest.mark.parametrize("single", [True, False])
def test_a_call_that_waits_for_another_says_so(single):
    runtime = built()
    rows = rows_of(TINY, 3)
    waiting = threading.Event()
    clock_ns = runtime._clock_ns

    def clock():
        waiting.set()
        return clock_ns()

    runtime._clock_ns = clock
    runtime._lock.acquire()
    thread = threading.Thread(target=runtime.predict, args=(rows[0] if single else rows,))
    thread.start()
    assert waiting.wait(10)  # it has looked at the clock, and asks for the lock next
    runtime._lock.release()
    thread.join()
    seen = runtime.take_window()
    assert seen.queueing.count == seen.latency.count == 1
    assert seen.queueing.max_ns > 0


def test_many_waits_are_merged_before_the_window_ends():
    runtime = built()
    runtime._waits_ns.extend([7] * (RING_ROWS - 1))
    runtime._wait()
    runtime._lock.release()
    assert len(runtime._waits_ns) == 0
    assert runtime.take_window().queueing.count == RING_ROWS


def test_load_that_is_shed_is_refused_and_counted():
    runtime = built()
    rows = rows_of(TINY, 5)
    assert not runtime.shedding
    runtime.shedding = True
    for given in (
        rows[0],
        rows,
        rows[0].tolist(),
        dict(zip("abc", rows[0].tolist(), strict=True)),
        [rows[0]] * 2,
    ):
        with pytest.raises(BudgetExceeded, match=r"load is shed: \d rows are not predicted; ask again later"):
            runtime.predict(given)
    runtime.swap(Engine(classifier(missing=("b",), seed=1).artifact))  # a new model is no reason to stop
    with pytest.raises(BudgetExceeded):
        runtime.predict(rows[0])
    runtime.shedding = False
    runtime.predict(rows[0])
    seen = runtime.take_window()
    assert (seen.rows, seen.failed, seen.refused) == (1, 0, (("shed", 1),))


def test_rows_that_were_shed_are_counted_by_rows():
    runtime = built()
    runtime.shedding = True
    for given in (rows_of(TINY, 5), rows_of(TINY, 1)[0]):
        with pytest.raises(BudgetExceeded):
            runtime.predict(given)
    assert runtime.take_window().refused == (("shed", 6),)


def test_a_large_batch_is_run_in_parts_with_the_same_answers(monkeypatch):
    runtime = built()
    rows = rows_of(TINY, 10)
    whole = runtime.predict(rows)
    runtime.max_batch = 3
    calls = []
    run = runtime.engine._session.run

    def counted_run(*given):
        calls.append(1)
        return run(*given)

    monkeypatch.setattr(runtime.engine._session, "run", counted_run)
    parts = runtime.predict(rows)
    assert len(calls) == 4
    assert parts.score.tobytes() == whole.score.tobytes()
    assert parts.label.tolist() == whole.label.tolist()
    seen = runtime.take_window()
    assert seen.latency.count == 2
    assert seen.profile == counted(TINY, np.concatenate([rows, rows]))


def test_a_run_beyond_its_limit_is_counted_as_failed():
    runtime = built()
    rows = rows_of(TINY, 2)

    def late():
        raise BudgetExceeded("a run took longer than 1 s and was ended")

    serves: Any = runtime._serving
    row, _, *after = good = serves.hot
    serves.hot = (row, late, *after)
    with pytest.raises(BudgetExceeded, match="longer than 1 s"):
        runtime.predict(rows[0])
    serves.hot = good
    runtime.predict(rows[1])
    seen = runtime.take_window()
    assert (seen.failed, seen.rows) == (1, 1)


@pytest.mark.parametrize("sizes", [(400, 400, 400), (1023, 1, 1), (1024, 5), (1500, 3), (3, 1500)])
def test_batches_that_wait_are_counted_in_the_order_they_came(sizes):
    runtime = built()
    rows = np.repeat(rows_of(TINY, 1600), 2, axis=0)[: 2 * sum(sizes)]  # each row repeats the one before
    done = 0
    for n in sizes:
        batch = rows[done : done + n].copy()
        runtime.predict(batch)
        batch[:] = 0  # the caller's memory, again
        done += n
        for row in rows[done : done + 2]:
            runtime.predict(row)
        done += 2
        assert runtime.rows == done
    assert runtime.take_window().profile == counted(TINY, rows[:done])


def test_numbers_near_the_end_of_float32_are_numbers():
    runtime = built()
    largest = np.finfo(np.float32).max
    for value in (2.0**127, largest, -largest):
        runtime.predict(np.array([value, 0, 0], np.float32))
    assert runtime.take_window().refused == ()


def test_batches_wait_for_each_other_to_be_counted():
    runtime = built()
    for n in range(1, 4):
        runtime.predict(rows_of(TINY, 10))
        assert (runtime._serving.binner.rows, runtime.rows) == (0, 10 * n)
    runtime.predict(rows_of(TINY, 1)[0])
    assert runtime.take_window().rows == 31
