"""What any telemetry store must do: the kit that every implementation of `aggregator.stores.WindowStore` passes.

A test class derives from `WindowKit` and gives the fixture ``places``: each call names a new place, and what it returns
opens the store there again and again. The stores keep `LETTERS` dead letters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregator.records import Arrival, DeadLetter, DeviceTotals, Selection
from aggregator.stores import NEWEST, CutDay, StoreError, Unstorable, WindowStore
from edge_runtime.contract.codec import encode
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import DeviceId, Digest, ModelName, SourceId
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import Event, Labels, Window
from edge_runtime.contract.profile import empty_profile, merge_all
from tests.support.fleet import (
    DAY,
    NAMES,
    NOW,
    OTHER_SESSION,
    SECOND,
    SPEC,
    A,
    B,
    C,
    count,
    event,
    labels,
    make_spec,
    window,
)

LETTERS: Final = 5
LETTER_BYTES: Final = 16 * 1024
OTHER: Final = ModelName("other")
Opener = Callable[..., WindowStore]


def arrival(w, *, judged=True):
    return Arrival(window=w, payload=encode(w), judged=judged)


def put(store, *windows, judged=True, at=NOW):
    return store.append([arrival(w, judged=judged) for w in windows], [], [], at)


def merged(store, **conditions):
    found = store.profiles(Selection(**conditions))
    assert len(found) <= 1
    return found[0] if found else empty_profile(SPEC, probabilities=True)


def prune(store, before_ns):
    """Until there is nothing left to prune; how much went."""
    gone = 0
    while found := store.prune(before_ns):
        gone += found
    return gone


def of_other(w):
    """The same window, of another model of the device."""
    return replace(w, model=OTHER, digest=B)


def once(arrivals):
    """What the windows come to, each counted once: totals without times, the profile, the latencies."""
    found: dict[tuple[str, str], Any] = {}
    for w in arrivals:
        t = found.setdefault((w.device, w.digest), np.zeros(10))
        n, c = w.labelled, w.correct
        refused = sum(k for _, k in w.refused)
        t += (w.windows, w.profile.rows, w.failed, refused, n, c, len(encode(w)), n * n, c * n, c * c)
    return (
        {key: t.tolist() for key, t in found.items()},
        merge_all(SPEC, [w.profile for w in arrivals], probabilities=True),
        merge_latencies(w.latency for w in arrivals),
    )


def counted(store):
    """The same, as the store tells it."""

    def numbers(t: DeviceTotals) -> list[float]:
        counts = (t.windows, t.rows, t.failed, t.refused, t.labelled, t.correct, t.wire_bytes)
        return [*map(float, counts), t.labelled_squares, t.products, t.correct_squares]

    totals = {(t.device, t.digest): numbers(t) for t in store.totals(Selection())}
    return totals, merged(store), store.latency(Selection())


@dataclass
class Kept:
    """A window as a store has it."""

    window: Window
    number: int
    at: int
    is_rejected: bool
    rolled_up: bool = False

    @property
    def rows(self):
        return self.window.profile.rows


SENDINGS: Final = st.lists(
    st.tuples(
        st.sampled_from(("dev-1", "dev-2", "dev-3")), st.sampled_from("abc"), st.integers(0, 8), st.booleans()
    ),
    min_size=6,
    max_size=14,
)
"""(device, artifact, third of a day of receipt, whether it is odd), in the order in which they are put."""
MOMENTS: Final = st.integers(0, 8).map(lambda k: NOW + k * DAY // 3)
SELECTIONS: Final = st.builds(
    Selection,
    model=st.sampled_from((None, None, None, window().model, OTHER)),
    digest=st.sampled_from((None, None, A, B, C)),
    devices=st.none() | st.lists(st.sampled_from(("dev-1", "dev-2", "unheard-of")).map(DeviceId)).map(tuple),
    since_ns=st.just(0) | MOMENTS | MOMENTS.map(lambda at: at + 1),
    until_ns=st.just(NEWEST) | MOMENTS,
    after=st.sampled_from((0, 0, 0, 0, 0, 1, 5, 20)),
    last=st.sampled_from((0, 0, 0, 1, 2, 5, 20)),
    leave_out_cut_days=st.just(True),
)


def selected(kept, s):
    """The windows that answer, by their numbers: one by one, or whole days of them where they are rolled up."""

    def fits(one):
        w = one.window
        return (
            not one.is_rejected
            and s.model in (None, w.model)
            and s.digest in (None, w.digest)
            and (s.devices is None or w.device in s.devices)
        )

    def is_inside(one):
        return s.since_ns <= one.at < s.until_ns

    found = [
        one for one in kept if fits(one) and is_inside(one) and not one.rolled_up and one.number > s.after
    ]
    if s.last or s.after:
        return found[-s.last :]
    days: dict[tuple[object, ...], list[Kept]] = {}
    for one in filter(fits, kept):
        if one.rolled_up:
            w = one.window
            days.setdefault((w.device, w.digest, w.model, w.profile.layout, one.at // DAY), []).append(one)
    whole = [one for day in days.values() if all(map(is_inside, day)) for one in day]
    return sorted([*found, *whole], key=lambda one: one.number)


def totals_of(chosen):
    """What `WindowStore.totals` says of ``chosen``, counted one by one."""
    streams: dict[tuple[DeviceId, Digest], list[Kept]] = {}
    for one in chosen:
        streams.setdefault((one.window.device, one.window.digest), []).append(one)
    return tuple(
        DeviceTotals(
            device=device,
            digest=digest,
            windows=len(those),
            rows=sum(one.rows for one in those),
            failed=sum(one.window.failed for one in those),
            refused=sum(n for one in those for _, n in one.window.refused),
            labelled=sum(one.window.labelled for one in those),
            correct=sum(one.window.correct for one in those),
            wire_bytes=sum(len(encode(one.window)) for one in those),
            rss_bytes=those[-1].window.health.rss_bytes,
            peak_rss_bytes=max(one.window.health.peak_rss_bytes for one in those),
            first_ns=min(one.at for one in those),
            last_ns=max(one.at for one in those),
            labelled_squares=float(sum(one.window.labelled**2 for one in those)),
            products=float(sum(one.window.labelled * one.window.correct for one in those)),
            correct_squares=float(sum(one.window.correct**2 for one in those)),
        )
        for (device, digest), those in sorted(streams.items())
    )


def merge_latencies(found):
    latency = LatencyHistogram()
    for one in found:
        latency = latency.merge(one)
    return latency


def session_of(device, session):
    """What a device sends in one session: windows of two models in turn, events between, some windows merged."""
    found: list[Window | Event] = []
    for seq in range(12):
        n = len(found) + sum(device.encode())
        w = window(
            device,
            seq,
            session=session,
            labelled=n,
            correct=n // 2,
            failed=seq % 2,
            refused=(("width", seq),),
        )
        if seq in (4, 9):
            found.append(replace(event(device, seq), session=session))
        elif seq == 11:
            continue
        elif seq == 10:
            found.append(replace(w, seq=11, seq_lo=10, windows=2))
        else:
            found.append(of_other(w) if seq % 3 == 0 else w)
    return found


SENT: Final = [
    *session_of("dev-1", "00000000000000aa"),
    *session_of("dev-2", "00000000000000aa"),
]


class WindowKit:
    """The tests; derive from it and give ``places``."""

    @pytest.fixture
    def places(self) -> Callable[[], Opener]:
        """Each call makes a new place and returns what opens the store there, as a writer or ``read_only``."""
        raise NotImplementedError

    @pytest.fixture
    def opened(self, places):
        return places()

    @pytest.fixture
    def store(self, opened):
        made = opened()
        yield made
        made.close()

    def test_a_duplicate_is_counted_as_one_and_changes_nothing(self, store):
        w = window()
        assert put(store, w).stored == 1
        again = put(store, w, w)
        assert (again.stored, again.duplicates) == (0, 2)
        assert merged(store) == w.profile
        assert store.figures().duplicates_rejected == 2
        assert store.figures().windows == 1

    def test_sessions_and_devices_count_apart(self, store):
        put(store, window("dev-1", 1), window("dev-2", 1), window("dev-1", 1, session=OTHER_SESSION))
        assert merged(store).rows == 60

    @pytest.mark.parametrize(("lo", "hi"), [(2, 4), (1, 9), (4, 9), (4, 4), (5, 5)])
    def test_a_merged_record_that_overlaps_a_stored_one_is_not_counted_twice(self, store, lo, hi):
        put(store, window(seq=5, seq_lo=3))
        found = put(store, window(seq=hi, seq_lo=lo))
        assert (found.stored, found.duplicates, found.overlapping) == (0, 0, 1)
        assert merged(store).rows == 20
        assert "overlap the stored 3 to 5" in store.dead_letters()[0]["reason"]

    @pytest.mark.parametrize(("lo", "hi"), [(1, 2), (6, 9), (6, 6)])
    def test_records_that_touch_but_do_not_overlap_are_both_counted(self, store, lo, hi):
        put(store, window(seq=5, seq_lo=3))
        assert put(store, window(seq=hi, seq_lo=lo)).stored == 1

    def test_a_merged_record_counts_as_the_windows_it_holds(self, store):
        put(store, window(seq=5, seq_lo=3, windows=3), window(seq=6))
        assert store.figures().windows == 4
        (totals,) = store.totals(Selection())
        assert (totals.windows, totals.rows) == (4, 40)
        assert store.block(A, DeviceId("dev-1"), 0, rows=40, seconds=20).reading.windows == 4
        put(store, window(seq=5, seq_lo=3, windows=3))
        assert store.figures().windows == 4

    def test_totals_by_device_and_filter(self, store):
        put(store, window("dev-1", 1, labelled=10, correct=7, refused=(("width", 2),), failed=1))
        put(store, window("dev-1", 2, labelled=5, correct=5), at=NOW + SECOND)
        put(store, window("dev-2", 1, model=B), at=NOW + 2 * SECOND)
        first, second = store.totals(Selection())
        assert (first.device, first.windows, first.rows, first.labelled, first.correct) == (
            "dev-1",
            2,
            40,
            15,
            12,
        )
        assert (first.refused, first.failed, first.rss_bytes, first.peak_rss_bytes) == (2, 1, 1002, 2002)
        assert (first.first_ns, first.last_ns) == (NOW, NOW + SECOND)
        assert (second.device, second.digest) == ("dev-2", B)
        assert [t.device for t in store.totals(Selection(digest=A))] == ["dev-1"]
        assert [t.windows for t in store.totals(Selection(since_ns=NOW + SECOND))] == [1, 1]
        assert [t.windows for t in store.totals(Selection(until_ns=NOW + SECOND))] == [1]
        assert [t.device for t in store.totals(Selection(devices=(DeviceId("dev-2"),)))] == ["dev-2"]
        assert store.totals(Selection(devices=())) == ()
        assert [t.device for t in store.totals(Selection(last=1))] == ["dev-2"]

    def test_profiles_latency_and_sizes_by_filter(self, store):
        windows = [window(seq=seq, latency_ns=1000 * seq) for seq in range(1, 6)]
        put(store, *windows)
        assert merged(store, last=2) == windows[3].profile.merge(windows[4].profile)
        latency = LatencyHistogram()
        for w in windows:
            latency = latency.merge(w.latency)
        assert store.latency(Selection()) == latency
        sizes = sorted(len(encode(w)) for w in windows)
        assert store.wire_bytes(Selection()) == sizes[2]
        assert store.wire_bytes(Selection(), 0.0) == sizes[0]
        assert store.wire_bytes(Selection(), 1.0) == sizes[-1]
        assert store.wire_bytes(Selection(digest=C)) == 0
        assert list(store.windows(Selection())) == windows

    def test_profiles_of_different_layouts_are_not_merged(self, store):
        other = make_spec(seed=7)
        odd = replace(window(seq=2).profile, layout=other.layout)
        put(store, window(seq=1), window(seq=2, profile=odd))
        assert {p.layout for p in store.profiles(Selection())} == {SPEC.layout, other.layout}

    def test_a_block_takes_the_newest_windows_until_it_covers_the_horizon(self, store):
        windows = [
            window(
                seq=seq,
                labelled=seq,
                correct=1,
                refused=(("width", seq), ("unseen", 1)),
                start_ns=NOW + seq * SECOND,
            )
            for seq in range(1, 6)
        ]
        put(store, *windows, window("dev-2", 1))
        # Of 20 rows each; refused rows count, too.
        assert store.block(A, DeviceId("dev-1"), 0, rows=51, seconds=0).reading.windows == 2
        block = store.block(A, DeviceId("dev-1"), 0, rows=52, seconds=0)
        reading = block.reading
        assert (reading.device, reading.windows, reading.profile.rows) == ("dev-1", 3, 60)
        assert (reading.labelled, reading.correct, reading.refused) == (12, 3, (("unseen", 3), ("width", 12)))
        assert (reading.start_ns, reading.end_ns) == (NOW + 3 * SECOND, NOW + 15 * SECOND)
        assert (block.first, block.last, block.seconds) == (3, 5, 30.0)
        assert reading.profile == windows[2].profile.merge(windows[3].profile).merge(windows[4].profile)
        assert store.block(A, DeviceId("dev-1"), 0, rows=1, seconds=45.0).reading.windows == 5
        assert store.block(A, DeviceId("dev-1"), 4, rows=26, seconds=0).reading.windows == 1
        assert store.block(A, DeviceId("dev-1"), 4, rows=27, seconds=0) is None
        one, two = DeviceId("dev-1"), DeviceId("dev-2")
        assert store.pending(A, {one: 3, two: 0}) == {one: (51, 20.0, NOW), two: (20, 10.0, NOW)}
        assert store.pending(A, {one: 5, DeviceId("unheard-of"): 0}) == {}
        assert store.pending(B, {one: 0}) == store.pending(A, {}) == {}

    def test_streams_names_the_newest_window_of_each_device(self, store):
        put(store, window("dev-1", 1), window("dev-2", 1), window("dev-1", 2))
        assert store.streams() == ((A, DeviceId("dev-1"), 3), (A, DeviceId("dev-2"), 2))

    def test_an_unjudged_window_is_judged_when_its_artifact_is_known(self, store):
        honest, odd = window(seq=1), window(seq=2, profile=replace(window(seq=2).profile, rows=21))
        put(store, honest, odd, judged=False)
        assert store.unjudged() == (A,)
        assert store.block(A, DeviceId("dev-1"), 0, rows=1, seconds=0) is None
        assert merged(store, last=2).rows == 41  # telemetry is data, also before it is judged

        assert store.settle(A, lambda profile: profile.check(SPEC)) == (1, 1)
        assert store.settle(A, lambda profile: profile.check(SPEC)) == (0, 0)
        assert store.unjudged() == ()
        assert merged(store) == honest.profile
        assert store.figures().rejected == 1
        assert store.block(A, DeviceId("dev-1"), 0, rows=1, seconds=0).reading.profile.rows == 20
        assert put(store, odd).duplicates == 1  # a rejected window stays known

    def test_events_are_kept_once(self, store):
        store.append([], [event(seq=1), event(seq=1), event(seq=2, name="trial")], [], NOW)
        assert [e["name"] for e in store.events()] == ["trial", "started"]
        assert store.figures().duplicates_rejected == 1

    def test_dead_letters_are_bounded_and_repeats_are_counted(self, store):
        letters = [DeadLetter(f"topic-{i}", b"x" * (LETTER_BYTES + 1), "why") for i in range(8)]
        store.append([], [], [*letters, letters[-1], letters[-1]], NOW)
        kept = store.dead_letters()
        assert [k["topic"] for k in kept] == ["topic-7", "topic-6", "topic-5", "topic-4", "topic-3"]
        assert kept[0]["times"] == 3
        assert len(kept[0]["payload"]) == LETTER_BYTES
        assert kept[0]["length"] == LETTER_BYTES + 1
        assert store.figures().dead_letters == 5
        assert store.figures().dead_letters_ever == 10

    def test_the_largest_honest_counts_add_up(self, store):
        huge = 1 << 32
        for seq in range(4):
            put(store, window(seq=seq, labelled=huge, correct=huge))
        assert store.totals(Selection())[0].labelled == 4 * huge
        assert np.iinfo(np.int64).max > 4 * huge

    # ── reading and writing ────────────────────────────────────────────────────────────────────────────

    def test_a_reader_sees_what_was_committed_and_cannot_write(self, opened):
        with pytest.raises(ConfigError, match="no such store yet"):
            opened(read_only=True)
        store = opened()
        put(store, window(seq=1))
        reader = opened(read_only=True)
        assert reader.figures().windows == 1
        with pytest.raises(StoreError, match=r"read-?only"):
            put(reader, window(seq=2))
        reader.close()
        put(store, window(seq=3))
        store.close()
        again = opened()
        assert put(again, window(seq=1), window(seq=3)).duplicates == 2
        again.close()

    def test_a_batch_is_stored_whole_or_not_at_all(self, store):
        beyond = window(seq=2, labelled=1 << 70)
        with pytest.raises(Unstorable):
            store.append(
                [Arrival(window=w, payload=b"", judged=True) for w in (window(), beyond)], [], [], NOW
            )
        assert store.figures().windows == 0
        assert store.totals(Selection()) == ()
        assert put(store, window()).stored == 1

    # ── the numbers of a session ───────────────────────────────────────────────────────────────────────

    def test_a_record_of_one_model_may_span_numbers_of_another(self, store):
        merged_record = window(seq=5, seq_lo=1, windows=3)
        others = [of_other(window(seq=seq)) for seq in (2, 4)]
        assert put(store, others[0], merged_record, others[1]).stored == 3
        assert merged(store).rows == 60
        assert prune(store, NOW + 1) == 3
        late = of_other(window(seq=3))  # inside the merged record's span, which is not accounted for
        assert put(store, late, *others, merged_record).duplicates == 3
        assert merged(store).rows == 80

    def test_no_two_windows_have_one_number_whatever_their_models(self, store):
        put(store, window(seq=5))
        found = put(store, of_other(window(seq=5)), of_other(window(seq=5, seq_lo=3)))
        assert (found.stored, found.duplicates, found.overlapping) == (0, 0, 2)
        assert "the number is a window's of 'tiny'" in store.dead_letters()[0]["reason"]
        assert put(store, of_other(window(seq=6))).stored == 1

    # ── retention ──────────────────────────────────────────────────────────────────────────────────────

    def test_pruning_keeps_every_answer_but_the_windows_themselves(self, store):
        windows = [
            window(
                "dev-1",
                seq,
                labelled=seq,
                correct=1,
                failed=1,
                refused=(("width", 2),),
                latency_ns=1000 * seq,
            )
            for seq in range(1, 4)
        ]
        for i, w in enumerate(windows):
            put(store, w, at=NOW + i * DAY // 2)
        store.append([], [event(seq=9)], [], NOW)
        before = (counted(store), store.totals(Selection()), store.figures(), store.streams())
        assert prune(store, NOW + DAY) == 3
        assert [w.seq for w in store.windows(Selection())] == [3]
        assert store.events() == ()
        after = (counted(store), store.totals(Selection()), store.figures(), store.streams())
        assert after == (*before[:2], replace(before[2], events=0), before[3])
        assert prune(store, NOW + 9 * DAY) == 1  # into the roll-up of the second
        assert list(store.windows(Selection())) == []
        assert (counted(store), store.totals(Selection())) == before[:2]

    def test_what_was_rolled_up_is_refused_when_it_comes_again(self, store):
        put(store, *(window(seq=seq) for seq in (1, 2, 3)), window(seq=7, seq_lo=5))
        store.append([], [event(seq=4)], [], NOW)
        prune(store, NOW + 1)
        again = put(store, *(window(seq=seq) for seq in (3, 1, 2)), window(seq=7, seq_lo=5))
        assert (again.stored, again.duplicates) == (0, 4)
        assert store.append([], [event(seq=4)], [], NOW).duplicates == 1
        found = put(store, window(seq=8, seq_lo=7), window(seq=5, seq_lo=4))
        assert found.overlapping == 2
        assert "rolled up: counted once already" in store.dead_letters()[0]["reason"]
        assert put(store, window(seq=8), window(seq=4)).stored == 2
        assert merged(store).rows == 6 * 20

    def test_numbers_go_on_when_everything_was_rolled_up(self, store):
        """Looks remember numbers: one that came twice would never be looked at."""
        put(store, window(seq=1), window(seq=2))
        ((_, _, newest),) = store.streams()
        prune(store, NOW + 1)
        put(store, window(seq=3))
        ((_, _, later),) = store.streams()
        assert later > newest
        assert store.pending(A, {DeviceId("dev-1"): newest})[DeviceId("dev-1")][0] == 20
        assert store.block(A, DeviceId("dev-1"), newest, rows=1, seconds=0).reading.profile.rows == 20

    def test_the_highest_numbers_ever_stay_when_everything_was_rolled_up(self, store):
        assert store.numbered() == (0, 0)
        put(store, window(seq=1), window(seq=2))
        store.append([], [], [], NOW, labels=[labels(seq=seq) for seq in (1, 2, 3)])
        ((_, _, newest),) = store.streams()
        (*_, last) = store.late(A, {})
        assert store.numbered() == (newest, last.number)
        prune(store, NOW + 1)
        assert store.numbered() == (newest, last.number)

    def test_windows_are_selected_by_number_as_far_as_they_are_kept_one_by_one(self, store):
        put(store, *(window(seq=seq) for seq in range(1, 5)))
        (_, second, third, _) = (r.number for r in store.receipts(A))
        assert [w.seq for w in store.windows(Selection(after=second))] == [3, 4]
        assert [w.seq for w in store.windows(Selection(after=third, last=2))] == [4]
        assert merged(store, after=second).rows == 40
        assert store.totals(Selection(after=store.numbered()[0])) == ()
        prune(store, NOW + 1)
        assert store.totals(Selection(after=1)) == ()

    # ``places`` makes each example a store of its own.
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
    @given(SENDINGS, st.sampled_from((0, 0, 2, 4, 6)), st.lists(SELECTIONS, min_size=4, max_size=10))
    def test_any_selection_answers_what_counting_the_windows_does(self, places, sent, pruned, selections):
        store = places()()
        try:
            kept = [self._sent(store, seq, *one) for seq, one in enumerate(sent, 1)]
            while any(store.settle(B, lambda profile: profile.check(SPEC))):
                pass
            prune(store, NOW + pruned * DAY // 3)
            for one in kept:
                one.rolled_up = one.at < NOW + pruned * DAY // 3
            for selection in selections:
                chosen = selected(kept, selection)
                assert store.totals(selection) == totals_of(chosen)
                assert store.latency(selection) == merge_latencies(one.window.latency for one in chosen)
                assert sum(p.rows for p in store.profiles(selection)) == sum(one.rows for one in chosen)
                alone = [one.window for one in chosen if not one.rolled_up]
                assert list(store.windows(selection)) == alone
        finally:
            store.close()

    @staticmethod
    def _sent(store, seq, name, model, moment, is_odd):
        """Puts a window of artifact A judged, of B judged later, when odd ones are rejected, of C never judged."""
        digest = {"a": A, "b": B, "c": C}[model]
        w = window(
            name, seq, model=digest, labelled=seq, correct=seq // 2, failed=seq % 2, refused=(("width", seq),)
        )
        w = replace(w, latency=window(latency_ns=1000 * seq).latency)
        if is_odd:
            w = replace(w, model=OTHER) if digest == A else replace(w, profile=replace(w.profile, rows=21))
        at = NOW + moment * DAY // 3
        put(store, w, judged=digest == A, at=at)
        return Kept(w, store.numbered()[0], at, is_rejected=is_odd and digest == B)

    def test_roll_ups_are_selected_by_day_and_key(self, store):
        put(store, window("dev-1", 1), window("dev-2", 1, model=B), at=NOW)
        put(store, window("dev-1", 2), at=NOW + 2 * DAY)
        put(store, window("dev-1", 4), at=NOW + 2 * DAY + 3600 * SECOND)  # on the same day
        put(store, window("dev-1", 3), at=NOW + 9 * DAY)
        prune(store, NOW + 5 * DAY)
        assert [(t.device, t.rows) for t in store.totals(Selection(digest=A))] == [("dev-1", 80)]
        assert merged(store, devices=(DeviceId("dev-2"),)).rows == 20
        assert merged(store, since_ns=NOW + DAY).rows == 60
        assert merged(store, until_ns=NOW + DAY).rows == 40
        assert merged(store, since_ns=NOW + 1, until_ns=NOW + 2 * DAY).rows == 0
        assert merged(store, last=5).rows == 20  # those that are kept one by one
        assert store.totals(Selection(model=OTHER)) == ()

    def test_part_of_a_rolled_up_day_is_refused_and_what_can_be_asked_instead_is_said(self, store):
        put(store, window("dev-1", 1), at=NOW)
        put(store, window("dev-1", 2), at=NOW + 3600 * SECOND)  # on the same day
        put(store, window("dev-1", 3), at=NOW + 9 * DAY)
        last_ns = NOW + 3600 * SECOND
        since: dict[str, Any] = {"since_ns": NOW + 1}
        until: dict[str, Any] = {"until_ns": last_ns}
        assert merged(store, **since).rows == 40  # kept one by one
        assert merged(store, **until).rows == 20
        prune(store, NOW + 5 * DAY)
        for cut in (since, until, since | until, {"since_ns": last_ns}):
            for ask in (store.profiles, store.totals, store.latency):
                with pytest.raises(CutDay, match=f"windows of dev-1 .* ask from {NOW} or {last_ns + 1} ns"):
                    ask(Selection(**cut))
            assert sum(t.rows for t in store.totals(Selection(**cut, leave_out_cut_days=True))) == (
                0 if "until_ns" in cut else 20
            )
        assert merged(store, since_ns=NOW).rows == 60
        assert merged(store, since_ns=last_ns + 1).rows == 20
        assert merged(store, until_ns=last_ns + 1).rows == 40
        assert merged(store, until_ns=NOW).rows == 0
        assert merged(store, since_ns=NOW + 1, last=9).rows == 20  # those that are kept one by one
        assert store.totals(Selection(since_ns=NOW + 1, digest=B)) == ()

    def test_receipts_say_when_what_is_kept_one_by_one_came(self, store):
        put(store, window("dev-2", 1), at=NOW)
        put(store, window("dev-1", 1), window("dev-1", 2, model=B), at=NOW + SECOND)
        put(store, window("dev-1", 3), judged=False, at=NOW + SECOND)
        span = window().end_ns - window().start_ns
        assert [(r.received_ns, r.device, r.rows, r.seconds) for r in store.receipts(A)] == [
            (NOW, "dev-2", 20, span / 1e9),
            (NOW + SECOND, "dev-1", 20, span / 1e9),
        ]
        prune(store, NOW + 1)
        assert [r.device for r in store.receipts(A)] == ["dev-1"]

    def test_a_block_as_it_was_when_less_had_come(self, store):
        for seq in range(1, 5):
            put(store, window("dev-1", seq), at=NOW + seq)
        device = DeviceId("dev-1")
        numbers = [r.number for r in store.receipts(A)]
        assert numbers == sorted(set(numbers))
        block = store.block(A, device, 0, rows=40, seconds=0.0, upto=numbers[1])
        assert block is not None
        assert (block.first, block.last) == (numbers[0], numbers[1])
        newest = store.block(A, device, block.last, rows=40, seconds=0.0)
        assert newest is not None
        assert (newest.first, newest.last) == (numbers[2], numbers[3])
        assert store.block(A, device, 0, rows=60, seconds=0.0, upto=numbers[1]) is None

    def test_what_is_rejected_never_answers_also_when_it_is_rolled_up(self, store):
        honest, odd = window(seq=1), window(seq=2, profile=replace(window(seq=2).profile, rows=21))
        put(store, honest, odd, judged=False)
        store.settle(A, lambda profile: profile.check(SPEC))
        prune(store, NOW + 1)
        assert counted(store) == once([honest])
        assert store.figures().rejected == 1
        assert put(store, odd).duplicates == 1

    def test_what_was_rolled_up_unjudged_is_judged_when_its_artifact_is_known(self, store):
        honest = [window("dev-1", seq) for seq in (1, 2)]
        odd = window("dev-2", 1, profile=replace(window("dev-2", 1).profile, rows=21))
        put(store, *honest, odd, judged=False)
        prune(store, NOW + 1)
        assert store.unjudged() == (A,)
        assert store.figures().unjudged == 3
        assert merged(store).rows == 61
        assert store.settle(A, lambda profile: profile.check(SPEC)) == (2, 1)
        assert store.settle(A, lambda profile: profile.check(SPEC)) == (0, 0)
        assert store.unjudged() == ()
        assert counted(store) == once(honest)
        assert (store.figures().unjudged, store.figures().rejected) == (0, 1)

    def test_profiles_that_cannot_be_merged_do_not_stand_in_the_way(self, store):
        plain = window(seq=1).profile
        shorter = replace(plain, counts=plain.counts[:-1])
        huge = replace(plain, counts=np.full_like(plain.counts, 2**63 - 1))
        put(
            store,
            *(window(seq=i, profile=p) for i, p in enumerate((plain, shorter, huge, plain, huge))),
            judged=False,
        )
        assert prune(store, NOW + 1) == 5
        assert sum(t.rows for t in store.totals(Selection())) == 5 * 20
        rejected = [0, 0]
        while any(found := store.settle(A, lambda profile: profile.check(SPEC))):
            rejected = [a + b for a, b in zip(rejected, found, strict=True)]
        assert sum(rejected) == 5
        assert merged(store).rows in (20, 40)

    # ── labels that come late ──────────────────────────────────────────────────────────────────────────

    def test_labels_are_counted_once_whoever_else_tells_them_again(self, store):
        one = labels()
        done = store.append([], [], [], NOW, labels=[one, replace(one, session=OTHER_SESSION)])
        assert (done.labels, done.duplicates, done.contradictions) == (1, 1, ())
        again = store.append([], [], [], NOW, labels=[one, labels(source="lab-2"), labels(seq=2)])
        assert (again.labels, again.duplicates) == (2, 1)
        (known,) = store.truths()
        assert (known.device, known.digest, known.labelled, known.correct) == ("dev-1", A, 30, 24)

    def test_other_counts_under_the_same_key_are_a_dead_letter_and_change_nothing(self, store):
        done = store.append([], [], [], NOW, labels=[labels(), labels(correct=7)])
        assert (done.labels, done.duplicates) == (1, 0)
        assert "7 of 10 rows right" in done.contradictions[0]
        assert "8 of 10" in done.contradictions[0]
        done = store.append([], [], [], NOW, labels=[labels(start_ns=NOW + 1)])
        assert len(done.contradictions) == 1
        assert store.truths()[0].correct == 8
        assert [letter["topic"] for letter in store.dead_letters()] == ["labels/lab"] * 2

    def test_the_estimate_beside_labels_is_of_the_windows_that_their_period_reaches(self, store):
        sure, unsure = ([(p, 1 - p, 0.0)] * 20 for p in (0.875, 0.5))
        rows = np.zeros((20, len(NAMES)))
        early = window(seq=1, profile=count(SPEC, rows, np.array(sure)))
        late = window(seq=2, profile=count(SPEC, rows, np.array(unsure)), start_ns=NOW + 10 * SECOND)
        unsynced = replace(window(seq=3), synced=False)
        put(store, early, late, unsynced, window("dev-2", 1), window(seq=4, model=B))
        told = [labels(seq=1), labels(seq=2, seconds=10.5), labels(seq=3, start_ns=NOW + 20 * SECOND)]
        store.append([], [], [], NOW, labels=told)
        known = next(t for t in store.truths(A) if t.device == "dev-1")
        assert (known.labelled, known.compared, known.compared_correct) == (30, 20, 16)
        assert known.expected == pytest.approx(10 * 0.875 + 10 * (0.875 + 0.5) / 2)

    def test_windows_that_nobody_has_judged_are_beside_labels_once_they_are(self, store):
        put(store, window(labelled=5, correct=1), judged=False)
        store.append([], [], [], NOW, labels=[labels()])
        assert [(t.labelled, t.compared) for t in store.truths()] == [(10, 0)]
        while any(store.settle(A, lambda profile: profile.check(SPEC))):
            pass
        assert [(t.labelled, t.compared, t.correct) for t in store.truths()] == [(15, 15, 9)]

    def test_late_labels_are_told_from_a_number_on_and_periods_and_twins_by_source(self, store):
        told = [labels(seq=1), labels("dev-2", 1), labels(seq=2, correct=3, start_ns=NOW + 20 * SECOND)]
        store.append([], [], [], NOW, labels=told)
        first, third, second = store.late(A, {})
        assert (first.device, third.device, second.device) == ("dev-1", "dev-1", "dev-2")
        assert (third.labelled, third.correct, third.start_ns) == (10, 3, NOW + 20 * SECOND)
        assert store.late(A, {DeviceId("dev-1"): first.number, DeviceId("dev-2"): second.number}) == (third,)
        assert store.late(B, {}) == ()
        assert store.periods(told[0].source) == (10 * SECOND,)
        assert store.twins([replace(one, source=SourceId("copy")) for one in told]) == {"lab": 3}
        assert store.twins(told) == {}

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
    @given(st.data())
    def test_any_order_and_repetition_of_labels_and_windows_comes_to_the_same(self, places, data):
        """The law of labels: what is known does not depend on what came first, how often, or what was rolled up."""
        windows = [
            window(f"dev-{d}", seq, start_ns=NOW + seq * 10 * SECOND, labelled=seq, correct=seq // 2)
            for d in (1, 2)
            for seq in range(4)
        ]
        told = [
            labels(f"dev-{d}", seq, source=source, start_ns=NOW + seq * 7 * SECOND, correct=seq)
            for d in (1, 2)
            for source in ("lab", "shop")
            for seq in range(4)
        ]
        wanted = self._comes_to(places()(), [[*windows, *told]])
        extra = data.draw(st.lists(st.sampled_from(told), max_size=8))
        sent = data.draw(st.permutations([*windows, *told, *extra]))
        step = data.draw(st.integers(3, 12))
        found = self._comes_to(places()(), [sent[i : i + step] for i in range(0, len(sent), step)])
        assert found == wanted

    def test_labels_that_were_rolled_up_are_known_and_not_counted_again(self, store):
        put(store, window(labelled=4, correct=2))
        told = [labels(seq=seq) for seq in (1, 2, 5)]
        store.append([], [], [], NOW, labels=told)
        before = store.truths()
        assert prune(store, NOW + 1) == 4
        assert store.truths() == before
        assert store.append([], [], [], NOW, labels=told).duplicates == 3
        assert store.append([], [], [], NOW, labels=[labels(seq=3)]).labels == 1
        assert store.late(A, {})[0].number > 3

    def test_the_periods_of_a_source_are_known_after_its_labels_were_rolled_up(self, opened):
        store = opened()
        told = [labels(seq=seq, seconds=seconds) for seq, seconds in ((1, 3600), (2, 3600), (3, 60))]
        other = labels(source="shop", seconds=5)
        store.append([], [], [], NOW, labels=[*told, other])
        prune(store, NOW + 1)
        store.close()
        store = opened()
        assert store.periods(told[0].source) == (60 * SECOND, 3600 * SECOND)
        assert store.periods(other.source) == (5 * SECOND,)
        assert store.periods(SourceId("nobody")) == ()
        store.append([], [], [], NOW, labels=[replace(told[0], correct=0)])  # known, so of no period
        assert store.periods(told[0].source) == (60 * SECOND, 3600 * SECOND)
        store.close()

    def test_labels_of_any_number_are_rolled_up_and_known(self, store):
        told = [labels(seq=seq) for seq in (0, 2**63 - 2, 2**63 - 1)]
        store.append([], [], [], NOW, labels=told)
        assert prune(store, NOW + 1) == 3
        assert prune(store, NOW + 1) == 0
        assert store.append([], [], [], NOW, labels=told).duplicates == 3

    @staticmethod
    def _comes_to(store, batches):
        try:
            for batch in batches:
                arrivals = [arrival(m) for m in batch if isinstance(m, Window)]
                store.append(arrivals, [], [], NOW, labels=[m for m in batch if isinstance(m, Labels)])
            return [
                (
                    t.device,
                    t.digest,
                    t.labelled,
                    t.correct,
                    t.compared,
                    t.compared_correct,
                    round(t.expected, 6),
                )
                for t in store.truths()
            ]
        finally:
            store.close()

    # ``places`` makes each example a store of its own.
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_any_order_of_appends_repeats_prunings_and_restarts_counts_each_once(self, places, data):
        """The law of the store: what it answers is what was appended, once each, whatever else happened."""
        extra = data.draw(st.lists(st.sampled_from(SENT), max_size=12))
        sent = data.draw(st.permutations([*SENT, *extra]))
        step = data.draw(st.integers(4, 12))
        opened = places()
        store = opened()
        seen: list[Window | Event] = []
        try:
            for i in range(0, len(sent), step):
                now = NOW + i * DAY // 7
                batch = sent[i : i + step]
                windows = [arrival(m) for m in batch if isinstance(m, Window)]
                new = [m for k, m in enumerate(batch) if m not in seen and m not in batch[:k]]
                done = store.append(windows, [m for m in batch if isinstance(m, Event)], [], now)
                assert done.stored == sum(isinstance(m, Window) for m in new)
                assert (done.duplicates, done.overlapping) == (len(batch) - len(new), 0)
                seen += new
                match data.draw(st.sampled_from(("go on", "prune", "restart"))):
                    case "prune":
                        prune(store, now - data.draw(st.integers(-1, 3)) * DAY)
                    case "restart":
                        store.close()
                        store = opened()
            whole = [m for m in SENT if isinstance(m, Window)]
            assert counted(store) == once(whole)
            figures = store.figures()
            assert figures.windows == sum(w.windows for w in whole)
            assert figures.rows == sum(w.profile.rows for w in whole)
            assert figures.duplicates_rejected == len(extra)
        finally:
            store.close()
