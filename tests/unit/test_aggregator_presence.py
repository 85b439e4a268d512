"""Whose last word counts."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from aggregator.core import presence
from edge_runtime.contract.ids import SessionId
from tests.support.fleet import DAY, NOW, OTHER_SESSION, SECOND, SESSION, birth, death, report

SESSIONS = [SessionId(f"{i:016x}") for i in range(1, 4)]


def play(*statuses, record=None):
    for status in statuses:
        record = presence.apply(record, status, NOW)
    return record


def test_a_birth_says_everything():
    found = play(birth(attributes=(("wrist", "left"),)))
    assert (found.online, found.seq, found.attribute("wrist"), found.cohort) == (True, 1, "left", "main")


def test_a_higher_seq_replaces_what_is_known_and_a_lower_one_does_not():
    new = birth(seq=3, models=(report(state="trial"),))
    assert play(birth(seq=1), new).models == new.models
    assert play(new, birth(seq=1)).models == new.models


def test_a_death_of_the_session_in_force_counts_and_keeps_what_is_known():
    found = play(birth(attributes=(("wrist", "left"),)), death())
    assert (found.online, found.attribute("wrist")) == (False, "left")


def test_a_device_that_seems_dead_is_asked_for_a_while():
    dead = play(birth(), death())
    assert dead.doubted_ns == NOW
    assert not presence.settle(dead, NOW + 30 * SECOND, 30 * SECOND).doubted_ns
    assert not play(birth(seq=2), record=dead).doubted_ns


def test_a_device_that_came_back_within_its_session_is_online():
    assert play(birth(seq=1), death(), birth(seq=2)).online


def test_a_death_is_doubted_until_the_device_stays_silent_for_long_enough():
    dead = play(birth(), death())
    assert dead.doubted_ns == NOW
    assert presence.settle(dead, NOW + 30 * SECOND, 30 * SECOND) == replace(dead, doubted_ns=0)
    assert not play(birth(seq=2), record=dead).doubted_ns


def test_a_death_and_birth_that_come_again_after_a_restart_leave_a_doubt():
    """The service died before it told the broker: the birth is known, the death counts again."""
    known = play(birth(seq=4), death(), birth(seq=5))
    again = play(death(), birth(seq=5), record=known)
    assert not again.online
    assert again.doubted_ns  # so the device is asked, and answers under a new seq
    assert play(birth(seq=6), record=again).online


def test_a_repeated_birth_does_not_undo_a_death():
    assert not play(birth(seq=2), death(), birth(seq=2), birth(seq=1)).online


def test_a_late_will_does_not_hide_a_newer_birth():
    found = play(birth(), birth(session=OTHER_SESSION), death())
    assert (found.online, found.session) == (True, OTHER_SESSION)


def test_a_late_birth_of_an_older_session_changes_nothing():
    new = play(birth(seq=3), birth(session=OTHER_SESSION))
    assert play(birth(seq=3), birth(seq=1), record=new) is new


def test_a_device_is_there_again_after_a_second_machine_of_its_name_was_stopped():
    """The session of the device is one that was replaced; it says under a new number that it is there."""
    ousted = play(birth(seq=3), birth(session=OTHER_SESSION), death(session=OTHER_SESSION))
    back = play(birth(seq=4), record=ousted)
    assert (back.online, back.session, back.seq) == (True, SESSION, 4)
    assert back.doubted_ns  # so it is asked, and its answer ends the doubt
    assert presence.is_shared(ousted, back)
    assert not play(birth(seq=5), record=back).doubted_ns
    assert not presence.is_shared(back, play(birth(seq=5), record=back))
    assert not presence.is_shared(None, play(birth()))
    assert not presence.is_shared(play(birth()), play(birth(), birth(session=OTHER_SESSION)))


def test_two_machines_that_take_turns_are_each_there_in_their_turn():
    record = play(birth(), birth(session=OTHER_SESSION))
    for seq in range(2, 5):
        for session, rival in ((SESSION, OTHER_SESSION), (OTHER_SESSION, SESSION)):
            record = play(death(session=rival), birth(seq=seq, session=session), record=record)
            assert (record.online, record.session) == (True, session)
    assert len(record.ended) == 1


def test_a_device_answers_for_a_second_machine_that_went_without_a_word():
    ousted = play(birth(seq=3), birth(session=OTHER_SESSION))
    asked = play(birth(seq=4), record=ousted)
    assert (asked.session, asked.online, asked.doubted_ns) == (OTHER_SESSION, True, NOW)
    assert play(birth(seq=4), record=asked) is asked  # come again, it is no answer
    assert play(birth(seq=5), record=asked).session == SESSION
    assert not play(birth(seq=2, session=OTHER_SESSION), record=asked).doubted_ns  # the second one is there


def test_a_birth_of_a_replaced_session_that_comes_again_revives_nobody():
    ousted = play(birth(seq=3), birth(session=OTHER_SESSION), death(session=OTHER_SESSION))
    assert play(birth(seq=3), birth(seq=1), death(), record=ousted) == ousted


def test_who_is_online_and_silent_for_long_is_doubted_and_then_away():
    record = play(birth())
    assert presence.doubt_silent(record, NOW + 599 * SECOND, 0, 600 * SECOND) is record
    doubted = presence.doubt_silent(record, NOW + 600 * SECOND, 0, 600 * SECOND)
    assert (doubted.online, doubted.doubted_ns) == (True, NOW + 600 * SECOND)
    assert presence.doubt_silent(doubted, NOW + 700 * SECOND, 0, 600 * SECOND) is doubted
    assert not play(birth(seq=2), record=doubted).doubted_ns
    assert not presence.settle(doubted, NOW + 700 * SECOND, 90 * SECOND).online


def test_who_could_not_be_heard_is_not_silent_and_who_is_away_is_not_asked():
    record, now = play(birth()), NOW + DAY
    assert presence.doubt_silent(record, now, now - SECOND, 600 * SECOND) is record
    gone = replace(record, online=False)
    assert presence.doubt_silent(gone, now, 0, 600 * SECOND) is gone


def test_a_death_is_all_that_is_known():
    found = play(death())
    assert (found.online, found.seq) == (False, -1)
    assert found.doubted_ns  # a retained will may be late as well
    assert play(birth(seq=0), record=found).online


def test_a_death_of_an_unknown_session_casts_doubt_until_the_device_speaks_or_stays_silent():
    doubted = play(birth(), death(session=OTHER_SESSION))
    assert doubted.online
    assert doubted.doubted_ns == NOW
    assert not play(birth(seq=2), record=doubted).doubted_ns
    assert not presence.heard(doubted, NOW).doubted_ns
    assert presence.settle(doubted, NOW + 29 * SECOND, 30 * SECOND) is doubted
    assert not presence.settle(doubted, NOW + 30 * SECOND, 30 * SECOND).online


def test_doubt_keeps_its_beginning():
    doubted = play(birth(), death(session=OTHER_SESSION))
    again = presence.apply(doubted, death(session=SessionId("c" * 16)), NOW + SECOND)
    assert again.doubted_ns == NOW


def test_nothing_new_is_the_same_record():
    record = play(birth())
    assert presence.apply(record, birth(), NOW + 1) is record
    dead = play(death(), record=record)
    assert presence.apply(dead, death(), NOW + 1) is dead
    assert presence.apply(dead, death(session=OTHER_SESSION), NOW + 1) is dead


@given(st.data())
def test_what_a_replaced_session_said_changes_nothing_when_it_comes_late_or_again(data):
    """Law: whatever of the older sessions is delivered late, again, or out of order, but its highest birth was seen."""
    record = None
    for session in SESSIONS:
        seqs = data.draw(st.lists(st.integers(1, 5), max_size=4))
        record = play(*(birth(seq=s, session=session) for s in (*seqs, 5)), record=record)
    record = data.draw(st.sampled_from([record, play(death(session=SESSIONS[-1]), record=record)]))
    late = st.sampled_from(SESSIONS[:-1]).flatmap(
        lambda s: st.one_of(
            st.just(death(session=s)), st.integers(1, 5).map(lambda n: birth(seq=n, session=s))
        )
    )
    assert play(*data.draw(st.lists(late, max_size=8)), record=record) == record


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=12), st.integers(0, 2))
def test_whoever_answers_last_under_new_numbers_is_there(words, last):
    """Law: however many machines spoke under one id before, the one that is left and is asked is believed."""
    record = play(
        birth(seq=1),
        *(birth(seq=n, session=SESSIONS[k]) if n else death(session=SESSIONS[k]) for k, n in words),
    )
    record = play(*(birth(seq=n, session=SESSIONS[last]) for n in (10, 11, 12)), record=record)
    assert (record.online, record.session, record.doubted_ns) == (True, SESSIONS[last], 0)


@given(st.lists(st.one_of(st.just(0), st.integers(1, 6)), min_size=1, max_size=12))
def test_one_session_ends_in_its_last_new_word(words):
    """Law: 0 is the death, n the birth with seq n. Only a birth above all births before it revives."""
    record = play(*(death() if w == 0 else birth(seq=w) for w in words))
    online, highest = False, -1
    for word in words:
        if word > highest and word:
            online, highest = True, word
        elif word == 0:
            online = False
    assert (record.online, record.seq, record.session) == (online, highest, SESSION)


@given(st.lists(st.one_of(st.just(0), st.integers(1, 6)), min_size=1, max_size=8))
def test_every_message_twice_is_every_message_once(words):
    statuses = [death() if w == 0 else birth(seq=w) for w in words]
    once = play(*statuses)
    twice = play(*(s for status in statuses for s in (status, status)))
    assert replace(once, last_seen_ns=0) == replace(twice, last_seen_ns=0)


def test_who_sends_a_lot_is_not_written_down_anew_each_time():
    record = presence.heard(play(birth()), NOW)
    assert record.last_seen_ns == NOW
    assert presence.heard(record, NOW + SECOND - 1) is record
    assert presence.heard(record, NOW + SECOND).last_seen_ns == NOW + SECOND
    assert presence.heard(record, NOW - 1).last_seen_ns == NOW - 1  # the clock was set back


def test_doubt_ends_however_recently_the_device_was_heard():
    doubted = play(birth(), death(session=OTHER_SESSION))
    assert not presence.heard(replace(doubted, last_seen_ns=NOW), NOW + 1).doubted_ns
