"""What looks in a row mean, as laws."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.config import DriftConfig
from aggregator.core.book import Book
from aggregator.core.findings import is_broken
from aggregator.looks import Finding, Trace
from edge_runtime.contract.ids import DeviceId

CONFIG = DriftConfig(confirmations=2, clear_confirmations=2)
DEVICES = tuple(DeviceId(f"d{i}") for i in range(5))

SURE = Finding(
    kind="drift",
    cohort="fleet",
    key="a",
    feature="a",
    moved=True,
    clear=False,
    at_once=True,
    p=1e-6,
    devices=DEVICES,
    judged=5,
    why="a moved",
)
UNSURE = replace(SURE, kind="skew", at_once=False)
CLOSE = replace(SURE, moved=False, p=0.1)
CALM = replace(CLOSE, clear=True, p=0.9)
SENSOR = replace(SURE, kind="sensor", devices=DEVICES[:1], why="d0 is odd", one_by_one=True)
EFFECT = replace(SURE, kind="prediction", key="the predictions", feature=None, grave=True)


def follow(*looks, book=None):
    """``o``, ``c`` or ``.`` for each look: what it opened and closed."""
    book = book or Book(CONFIG)
    marks = []
    for index, findings in enumerate(looks):
        opened, closed = book.advance(index, findings if isinstance(findings, list) else [findings])
        marks.append("o" * len(opened) + "c" * len(closed) or ".")
    return "".join(marks)


def test_proof_opens_at_once_and_the_rest_has_to_come_back():
    assert follow(SURE, SURE) == "o."
    assert follow(UNSURE, UNSURE, UNSURE) == ".o."
    assert follow(UNSURE, CLOSE, UNSURE, CALM, UNSURE) == "....."


def test_clear_looks_in_a_row_close_and_a_doubtful_one_starts_anew():
    assert follow(SURE, CALM, CALM) == "o.c"
    assert follow(SURE, CALM, CLOSE, CALM, SURE, CALM) == "o....."


def test_a_look_that_could_not_judge_changes_nothing():
    assert follow([], UNSURE, [], UNSURE, [], CALM, [], CALM, []) == "...o...c."


def test_the_alarm_is_what_the_finding_said_and_closes_with_its_look():
    book = Book(CONFIG)
    (opened,), _ = book.advance(3, [SURE])
    assert (opened.kind, opened.feature, opened.cohort, opened.devices) == ("drift", "a", "fleet", DEVICES)
    assert (opened.opened_window, opened.closed_window, opened.severity, opened.why) == (
        3,
        None,
        "ticket",
        "a moved",
    )
    book.advance(4, [CALM])
    _, (closed,) = book.advance(5, [CALM])
    assert closed == replace(opened, closed_window=5)
    assert book.open == ()


def test_the_gravest_of_what_moved_speaks_for_a_column():
    quality = replace(SURE, kind="quality", p=0.01)
    for order in ([SENSOR, SURE, quality, CALM], [CALM, quality, SURE, SENSOR]):
        book = Book(CONFIG)
        (opened,), _ = book.advance(0, order)
        assert opened.kind == "quality"


def test_sensors_add_up_and_become_the_fleets_when_there_are_many():
    book = Book(CONFIG)
    book.advance(0, [SENSOR])
    book.advance(1, [replace(SENSOR, devices=DEVICES[2:3])])
    assert book.open[0].devices == (DEVICES[0], DEVICES[2])
    book.advance(2, [SURE])
    (alarm,) = book.open
    assert (alarm.kind, alarm.devices, alarm.why, alarm.opened_window) == ("drift", DEVICES, "a moved", 0)


def test_the_sentence_is_of_the_devices_that_it_names():
    book = Book(CONFIG)
    book.advance(0, [SENSOR])
    book.advance(1, [replace(SENSOR, devices=DEVICES[2:3], why="d2 is odd", evidence=(("u", 9.0),))])
    (alarm,) = book.open
    assert (alarm.devices, alarm.why) == ((DEVICES[0], DEVICES[2]), "d2 is odd; earlier d0")
    assert alarm.evidence == (("u", 9.0),)


def test_an_open_incident_tells_what_the_newest_look_says_and_is_opened_once():
    book = Book(CONFIG)
    newer = replace(SURE, devices=DEVICES[:4], why="a moved more", evidence=(("p", 1e-9),), grave=True)
    assert follow(replace(SURE, devices=DEVICES[:3]), newer, CLOSE, CALM, newer, book=book) == "o...."
    (alarm,) = book.open
    assert (alarm.devices, alarm.why, alarm.evidence) == (DEVICES[:4], "a moved more", (("p", 1e-9),))
    assert (alarm.opened_window, alarm.severity) == (0, "page")


@pytest.mark.parametrize(
    "other",
    [
        replace(SENSOR, why="d0 is odd"),
        replace(UNSURE, why="a is not as in training"),
        replace(SURE, kind="quality", why="a: missing values", evidence=(("fault", "missing values"),)),
    ],
    ids=lambda finding: finding.kind,
)
def test_what_another_test_says_does_not_speak_for_an_open_incident(other):
    book = Book(CONFIG)
    book.advance(0, [SURE])
    book.advance(1, [replace(other, devices=DEVICES[:1])])
    (alarm,) = book.open
    assert (alarm.kind, alarm.devices, alarm.why) == ("drift", DEVICES, "a moved")


def test_whom_a_movement_of_the_answers_concerns_stays_what_it_was():
    book = Book(CONFIG)
    book.advance(0, [EFFECT])
    (before,) = book.open
    book.advance(1, [replace(EFFECT, devices=DEVICES[:1], why="less")])
    assert book.open == (before,)


def test_new_categories_on_top_of_lost_values_do_not_make_a_better_model_likelier():
    book = Book(CONFIG)
    lost = replace(SURE, kind="quality", why="lost", evidence=(("fault", "missing values"),))
    book.advance(0, [lost])
    book.advance(
        1, [replace(lost, why="new", devices=DEVICES[:2], evidence=(("fault", "unseen categories"),))]
    )
    (alarm,) = book.open
    assert (alarm.why, alarm.devices) == ("lost", DEVICES[:2])
    assert is_broken(alarm)


def test_what_sensors_did_is_no_persistence_of_the_fleet():
    book = Book(CONFIG)
    for index in range(3):
        book.advance(index, [SENSOR])
    book.advance(3, [SURE])
    assert book.persisting("fleet", ("drift",), 2) == ()
    book.advance(4, [SURE])
    assert [a.kind for a in book.persisting("fleet", ("drift",), 2)] == ["drift"]
    book.advance(5, [SENSOR])
    assert book.persisting("fleet", ("drift",), 2) == ()


def test_a_sensor_becomes_the_fleets_only_on_proof():
    book = Book(CONFIG)
    kinds = []
    for index, finding in enumerate([SENSOR, SENSOR, UNSURE, UNSURE]):
        book.advance(index, [finding])
        kinds.append(book.open[0].kind)
    assert kinds == ["sensor", "sensor", "sensor", "skew"]


def test_what_moves_the_answers_makes_its_cause_a_page():
    book = Book(CONFIG)
    elsewhere = replace(SURE, cohort="wrist=left")
    book.advance(0, [SURE, replace(SENSOR, key="b", feature="b"), elsewhere])
    assert {a.severity for a in book.open} == {"ticket"}
    book.advance(1, [SURE, EFFECT])
    severity = {(a.cohort, a.kind): a.severity for a in book.open}
    assert severity == {
        ("fleet", "drift"): "page",
        ("fleet", "prediction"): "page",
        ("fleet", "sensor"): "ticket",
        ("wrist=left", "drift"): "ticket",
    }


def test_a_retired_incident_is_gone():
    book = Book(CONFIG)
    book.advance(0, [SURE])
    book.retire(book.traces[0])
    assert book.open == ()
    assert book.traces == (Trace(cohort="fleet", key="a"),)


# ── laws ───────────────────────────────────────────────────────────────────────────────────────────────

findings = st.sampled_from([SURE, UNSURE, CLOSE, CALM, SENSOR, EFFECT]).flatmap(
    lambda f: st.builds(
        lambda cohort, key: replace(f, cohort=cohort, key=f.key if f is EFFECT else key),
        st.sampled_from(["fleet", "site=x"]),
        st.sampled_from(["a", "b"]),
    )
)
histories = st.lists(st.lists(findings, max_size=5), max_size=12)


@given(histories)
def test_at_most_one_incident_stands_for_a_column_of_a_cohort(looks):
    book = Book(CONFIG)
    standing: dict[tuple[str, str], int] = {}
    for index, found in enumerate(looks):
        before = {(t.cohort, t.key) for t in book.traces if t.alarm}
        opened, closed = book.advance(index, found)
        now = {(t.cohort, t.key): t.alarm for t in book.traces if t.alarm}
        assert len(book.open) == len(now)
        assert len(now) == len(before) + len(opened) - len(closed)
        assert all(a.opened_window == index and a.closed_window is None for a in opened)
        assert all(a.closed_window == index for a in closed)
        for key in before & now.keys():
            assert now[key].opened_window == standing[key]
        standing = {key: alarm.opened_window for key, alarm in now.items()}


@given(histories)
def test_columns_without_a_finding_stay_as_they_are(looks):
    book = Book(CONFIG)
    for index, found in enumerate(looks):
        before = {(t.cohort, t.key): t for t in book.traces}
        book.advance(index, found)
        touched = {(f.cohort, f.key) for f in found}
        for trace in book.traces:
            key = trace.cohort, trace.key
            was = before.get(key)
            if key not in touched and trace.alarm and was and was.alarm:
                assert (trace.streak, trace.clear) == (was.streak, was.clear)
                assert replace(trace.alarm, severity="") == replace(was.alarm, severity="")


@given(histories, st.integers(0, 12))
def test_another_book_goes_on_where_one_left_off(looks, cut):
    whole, first = Book(CONFIG), Book(CONFIG)
    told = [whole.advance(i, found) for i, found in enumerate(looks)]
    again = [first.advance(i, found) for i, found in enumerate(looks[:cut])]
    second = Book(CONFIG, first.traces)
    again += [second.advance(i, found) for i, found in enumerate(looks) if i >= cut]
    assert again == told
    assert second.traces == whole.traces


@given(histories, st.randoms())
def test_the_order_of_findings_does_not_matter_for_what_opens_and_closes(looks, random):
    one, other = Book(CONFIG), Book(CONFIG)
    for index, found in enumerate(looks):
        distinct = {(f.cohort, f.key, f.kind, f.moved, f.p): f for f in found}
        shuffled = list(distinct.values())
        random.shuffle(shuffled)
        assert one.advance(index, list(distinct.values())) == other.advance(index, shuffled)


@pytest.mark.parametrize("looks", [2, 3])
def test_an_open_column_that_stopped_moving_does_not_persist(looks):
    book = Book(CONFIG)
    for index in range(looks):
        book.advance(index, [SURE])
    assert book.persisting("fleet", ("drift", "skew"), looks)
    assert not book.persisting("fleet", ("drift", "skew"), looks + 1)
    assert not book.persisting("fleet", ("quality",), looks)
    book.advance(looks, [CLOSE])
    assert not book.persisting("fleet", ("drift",), 1)
