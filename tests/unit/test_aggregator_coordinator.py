"""Orders in, releases out."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.config import RolloutConfig
from aggregator.core import coordinator as core
from aggregator.core import gates, requests, rollout
from aggregator.core.coordinator import (
    Answer,
    Audit,
    Coordinator,
    Publish,
    RequestSeen,
    Save,
    StatusSeen,
    Tick,
    Warn,
)
from aggregator.core.revisions import HIGHEST
from aggregator.records import SKIPPED_REVISIONS, Gates, Request
from edge_runtime.contract import release
from edge_runtime.contract.ids import CohortId, RolloutId
from edge_runtime.contract.release import EVERYONE, desired
from tests.support.fleet import DAY, FLEET, MODEL, NOW, SECOND, A, B, device

MAIN = CohortId("main")
CONFIG = RolloutConfig(stages=(1, 1.0), gates=Gates(bake_seconds=5.0, committed_share=1.0))


def coordinator(devices=(), **options):
    return Coordinator(FLEET, CONFIG, devices=devices, **options)


def fleet(n=4, **options):
    return [device(f"dev-{i}", **options) for i in range(n)]


def request(kind=requests.START, number=1, **document):
    named = {"model": MODEL, "candidate": B} if kind == requests.START else {"model": MODEL}
    document = {**named, **document}
    return Request(
        number=number, kind=kind, document=json.dumps(document), by="ann", why="because", created_ns=NOW
    )


def order(c, kind=requests.START, number=1, *, at=NOW, artifact=MODEL, **document):
    return c.handle(RequestSeen(request(kind, number, **document), artifact), at)


def tick(c, at=NOW):
    return c.handle(Tick({}), at)


def releases(actions):
    return [a.release for a in actions if isinstance(a, Publish)]


def answer(actions):
    (found,) = [a for a in actions if isinstance(a, Answer)]
    return found


def refusal(actions):
    found = answer(actions)
    assert not found.accepted
    assert not releases(actions)
    (audit,) = [a for a in actions if isinstance(a, Audit)]
    assert (audit.entry.who, audit.entry.why) == ("ann", found.reason)
    return found.reason


def report(c, devices, **fields):
    """The devices say this of themselves now."""
    actions = []
    for d in devices:
        changed = replace(d, models=(replace(d.models[0], **fields),))
        actions += c.handle(StatusSeen(changed), NOW)
    return actions


def following(document):
    """What a device says that follows the release."""
    return {"rollout": document.rollout, "revision": document.revision}


def run_to_completion(c, devices, at=NOW):
    """Every device commits whatever it is told; returns the releases on the way."""
    found = []
    for _ in range(20):
        at += 6 * SECOND
        found += releases(tick(c, at))
        track = c.tracks[0]
        if track.rollout.state == "completed":
            return found
        for d in devices:
            serving = desired(track.release, d.device)
            found += releases(report(c, [d], serving=serving, state="committed", **following(track.release)))
    raise AssertionError(c.tracks)


def test_a_start_is_saved_and_audited_before_it_is_published():
    actions = order(coordinator(fleet()))
    kinds = [type(a) for a in actions]
    assert kinds.index(Publish) == len(kinds) - 1
    assert kinds.index(Answer) == 0
    assert [a.entry.what for a in actions if isinstance(a, Audit)] == ["start", "begin"]
    assert [a.entry.who for a in actions if isinstance(a, Audit)] == ["ann", "coordinator"]
    saved = [a.track for a in actions if isinstance(a, Save)][-1]
    (published,) = releases(actions)
    assert saved.release == published
    assert (published.revision, published.incumbent, published.candidate) == (1, None, B)
    assert saved.rollout is not None
    assert saved.rollout.revision == 1
    assert sum(desired(published, d.device) == B for d in fleet()) == 1


def test_a_draft_waits_for_its_first_device():
    c = coordinator()
    assert not releases(order(c))
    assert not releases(tick(c))
    (published,) = releases(c.handle(StatusSeen(device("dev-1")), NOW))
    assert desired(published, device("dev-1").device) == B


def test_a_rollout_completes_stage_by_stage_and_promotes():
    devices = fleet()
    c = coordinator(devices)
    first = releases(order(c))
    found = [*first, *run_to_completion(c, devices)]
    assert [r.revision for r in found] == [1, 2, 3]
    assert [r.threshold for r in found[1:]] == [EVERYONE, 0]
    assert (found[-1].incumbent, found[-1].candidate) == (B, None)


def test_a_second_rollout_starts_from_the_promoted_model_under_a_higher_revision():
    devices = fleet()
    c = coordinator(devices)
    order(c)
    run_to_completion(c, devices)
    (published,) = releases(order(c, number=2, candidate=A, at=NOW + SECOND))
    assert (published.revision, published.incumbent, published.candidate) == (4, B, A)


def test_a_stage_bakes_from_the_commit_on_and_a_restart_does_not_begin_anew():
    devices = fleet()
    c = coordinator(devices)
    (first,) = releases(order(c))
    done = {"serving": B, "state": "committed", **following(first)}
    report(c, devices, **done)
    (saved,) = [a.track for a in tick(c, NOW + SECOND) if isinstance(a, Save)]
    assert saved.rollout is not None
    assert saved.rollout.ready_since_ns == NOW + SECOND
    assert saved.release == first
    again = coordinator(
        [replace(d, models=(replace(d.models[0], **done),)) for d in devices],
        tracks=[saved],
        revisions={MAIN: 1},
    )
    assert not releases(tick(again, NOW + 5 * SECOND))
    assert releases(tick(again, NOW + 6 * SECOND))[0].revision == 2


def test_a_refusal_halts_at_once_and_everybody_goes_back():
    devices = fleet()
    c = coordinator(devices)
    (first,) = releases(order(c))
    canary = next(d for d in devices if desired(first, d.device) == B)
    refused = {
        "outcome": "refused",
        "outcome_digest": B,
        "reason": "too slow",
        "rollout": first.rollout,
        "revision": 1,
    }
    (halted,) = releases(report(c, [canary], **refused))
    assert (halted.revision, halted.threshold, halted.candidate) == (2, 0, None)
    (track,) = c.tracks
    assert track.rollout.state == "halted"
    assert "too slow" in track.rollout.note
    assert not tick(c, NOW + DAY)


def test_a_stage_that_gets_nowhere_is_paused_and_can_be_resumed():
    c = coordinator(fleet())
    order(c)
    late = NOW + 2 * DAY
    assert not releases(tick(c, late))
    (track,) = c.tracks
    assert track.rollout.state == "paused"
    assert "was not through" in track.rollout.note
    assert answer(order(c, "resume", 2, at=late)).accepted
    assert c.tracks[0].rollout.state == "running"
    tick(c, late + SECOND)
    assert c.tracks[0].rollout.state == "running"


def test_a_paused_rollout_still_halts():
    devices = fleet()
    c = coordinator(devices)
    (first,) = releases(order(c))
    order(c, "pause", 2)
    refused = {"outcome": "rolled_back", "outcome_digest": B, "rollout": first.rollout, "revision": 1}
    assert releases(report(c, devices, **refused))[0].threshold == 0


def test_orders_to_halt_and_to_roll_back():
    devices = fleet()
    c = coordinator(devices)
    order(c)
    (halted,) = releases(order(c, "halt", 2))
    assert halted.threshold == 0
    assert c.tracks[0].rollout.note == "ann: because"
    order(c, number=3, at=NOW + SECOND)
    run_to_completion(c, devices)
    order(c, number=4, candidate=A, at=NOW + 2 * SECOND)
    run_to_completion(c, devices)
    before = c.tracks[0].release
    assert before.incumbent == A
    (back,) = releases(order(c, "rollback", 5))
    assert (back.incumbent, back.revision) == (B, before.revision + 1)
    assert c.tracks[0].rollout.state == "rolled_back"


def test_there_is_nothing_before_a_first_model():
    devices = fleet()
    c = coordinator(devices)
    order(c)
    run_to_completion(c, devices)
    assert "nothing to go back to" in refusal(order(c, "rollback", 2))


def test_only_one_rollout_of_a_model_and_cohort_at_a_time():
    c = coordinator(fleet())
    order(c)
    assert "halt it first" in refusal(order(c, number=2, candidate=A))
    assert answer(order(c, number=3, candidate=A, cohort="beta")).accepted


@pytest.mark.parametrize(
    ("document", "artifact", "why"),
    [
        ({}, None, "publish it first"),
        ({}, "other", "is a model of other, not of tiny"),
        ({"candidate": "xyz"}, None, "not a SHA-256 digest"),
        ({"stages": [1, 2]}, MODEL, "the last stage must be 1.0"),
        ({"stages": [3, 2, 1.0]}, MODEL, "does not rise"),
        ({"stages": [0, 1.0]}, MODEL, "a count is at least 1"),
        ({"stages": [True, 1.0]}, MODEL, "neither a count"),
        ({"stagse": [1.0]}, MODEL, "did you mean 'stages'"),
        ({"gates": {"bake": 1}}, MODEL, "unknown key 'bake'"),
        ({"cohort": "#"}, MODEL, "not a cohort name"),
    ],
)
def test_a_bad_start_is_refused_with_the_reason(document, artifact, why):
    assert why in refusal(order(coordinator(fleet()), artifact=artifact, **document))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("halt", "there was never a rollout"),
        ("holt", "unknown request 'holt' (did you mean 'halt'?)"),
    ],
)
def test_a_bad_order_is_refused_with_the_reason(kind, why):
    assert why in refusal(order(coordinator(fleet()), kind))


def test_the_director_signs_only_what_the_publisher_vouches_for():
    c = coordinator(fleet())
    answers = c.handle(RequestSeen(request(), MODEL, published=False), NOW)
    assert "is not published, or was revoked" in refusal(answers)
    assert releases(answers) == []
    c.handle(RequestSeen(request(number=2), MODEL, published=True), NOW)
    assert c.tracks[0].rollout is not None


def test_orders_that_are_no_json_or_come_too_late_are_refused():
    c = coordinator(fleet())
    broken = replace(request(), document="{")
    assert "not JSON" in refusal(c.handle(RequestSeen(broken, MODEL), NOW))
    order(c)
    order(c, "halt", 2)
    assert "is halted, so it cannot halt" in refusal(order(c, "halt", 3))


def test_what_runs_already_is_not_rolled_out_and_a_name_is_used_once():
    devices = fleet()
    c = coordinator(devices)
    order(c, name="one")
    run_to_completion(c, devices)
    assert "runs already" in refusal(order(c, number=2))
    assert "used before" in refusal(order(c, number=3, candidate=A, name="one"))


def test_a_name_is_of_one_rollout_in_whatever_cohort():
    """Devices choose by it whether they are canaries, and evidence is gathered under it."""
    c = coordinator([device("dev-1", cohort="left"), device("dev-2", cohort="right")])
    order(c, cohort="left", name="spring")
    why = refusal(order(c, number=2, cohort="right", name="spring"))
    assert "spring was used before, for tiny in cohort left (running): choose another" in why
    assert answer(order(c, number=3, cohort="right", name="autumn")).accepted
    assert len({ask.rollout for ask in c.asks}) == len(c.asks) == 2


def test_a_name_that_only_the_ledger_remembers_is_refused_too():
    c = coordinator(fleet())
    order(c, name="spring")
    order(c, "halt", 2)
    spring = c.tracks[0].rollout
    assert answer(order(c, number=3, name="summer")).accepted  # the track forgets spring
    wish = request(number=4, cohort="beta", name="spring")
    assert "(halted): choose another" in refusal(c.handle(RequestSeen(wish, MODEL, namesake=spring), NOW))


def test_name_of_reads_only_what_starts_a_rollout():
    assert requests.name_of(request(name="spring")) == "spring"
    assert requests.name_of(request()) == requests.name_of(request("halt")) == ""
    assert requests.name_of(request(name=7)) == requests.name_of(replace(request(), document="[")) == ""


def test_without_a_director_key_nothing_starts():
    unsigned = "set director_key"
    assert (
        refusal(coordinator(fleet()).handle(RequestSeen(request(), MODEL, unsigned=unsigned), NOW))
        == unsigned
    )


def test_what_no_device_would_hear_is_not_ordered():
    """A halt that is signed with a key that devices take no more must not look like one that they heard."""
    c = coordinator(fleet())
    order(c)
    before = c.tracks
    for kind in core.ORDERS:
        unheard = RequestSeen(request(kind, 2), unsigned="copy the director's key there")
        assert refusal(c.handle(unheard, NOW)) == "copy the director's key there"
    assert c.tracks == before


# ── a ledger that forgot ───────────────────────────────────────────────────────────────────────────────

FORGOTTEN = {"serving": B, "state": "committed", "rollout": "before", "revision": 1011}


def warnings(actions):
    return [a.text for a in actions if isinstance(a, core.Warn)]


def test_a_ledger_that_was_lost_numbers_its_first_release_above_what_devices_follow():
    actions = order(coordinator(fleet(**FORGOTTEN)))
    (published,) = releases(actions)
    assert published.revision == 1011 + SKIPPED_REVISIONS
    (told,) = warnings(actions)
    assert "device dev-0 follows revision 1011 of cohort main" in told
    saved = [a.track for a in actions if isinstance(a, Save)][-1]
    assert saved.rollout is not None
    assert saved.rollout.revision == published.revision


def test_a_release_that_a_device_would_refuse_is_published_again_above_what_it_follows():
    devices = fleet()
    c = coordinator(devices)
    (first,) = releases(order(c))
    actions = report(c, devices[:1], **FORGOTTEN)
    (again,) = releases(actions)
    assert again == replace(first, revision=1011 + SKIPPED_REVISIONS)
    (saved,) = [a.track for a in actions if isinstance(a, Save)]
    assert saved.release == again
    assert [a.entry.what for a in actions if isinstance(a, Audit)] == ["renumber"]
    assert "dev-0" in warnings(actions)[0]
    assert not releases(report(c, devices, **{**FORGOTTEN, "revision": 1500}))  # it takes the new one


def test_a_canary_that_refuses_the_release_does_not_carry_its_stage():
    """It serves the candidate since before, and a namesake of this rollout may have told it to."""
    for name in ("before", "spring"):
        devices = fleet(1)
        c = coordinator(devices)
        order(c, name="spring")
        report(c, devices, **{**FORGOTTEN, "rollout": name})
        for k in range(1, 20):
            tick(c, NOW + k * SECOND)
        assert (c.tracks[0].rollout.stage, c.tracks[0].rollout.ready_since_ns) == (1, None)
        report(c, devices, serving=B, state="committed", **following(c.tracks[0].release))
        tick(c, NOW + 20 * SECOND)
        assert releases(tick(c, NOW + 26 * SECOND))


def test_a_device_that_changes_its_cohort_raises_no_revision_there():
    devices = fleet()
    c = coordinator(devices)
    (first,) = releases(order(c, name="left"))
    order(c, number=2, cohort="beta", name="right")
    moved = device("dev-0", cohort="beta", **{**following(first), "revision": first.revision + 5})
    (begun,) = releases(c.handle(StatusSeen(moved), NOW))
    assert (begun.cohort, begun.revision) == ("beta", 1)


def test_a_device_that_comes_from_a_rollout_long_over_raises_no_revision_either():
    """It was off while the cohort that it left went on to another."""
    devices = fleet()
    c = coordinator(devices, cohorts={RolloutId("of-last-year"): CohortId("beta")})
    (first,) = releases(order(c))
    late = device("late", **{**following(first), "rollout": RolloutId("of-last-year"), "revision": 41})
    assert all(r.revision < 41 for r in releases(c.handle(StatusSeen(late), NOW)))
    forgotten = device(
        "late", **{**following(first), "rollout": RolloutId("of-nobody-knows"), "revision": 41}
    )
    (renumbered,) = releases(c.handle(StatusSeen(forgotten), NOW))
    assert renumbered.revision == 41 + SKIPPED_REVISIONS


def test_what_this_ledger_numbered_itself_is_never_beyond_belief():
    devices = fleet()
    c = coordinator(devices, revisions={MAIN: 2**47 + 5})
    (first,) = releases(order(c))
    assert first.revision == 2**47 + 6
    assert not [
        a for a in c.handle(StatusSeen(device("dev-0", **following(first))), NOW) if isinstance(a, Warn)
    ]


def test_a_restart_remembers_what_devices_said():
    devices = fleet()
    c = coordinator(devices)
    (first,) = releases(order(c))
    known = [replace(d, models=(replace(d.models[0], **FORGOTTEN),)) for d in devices]
    again = coordinator(known, tracks=c.tracks, revisions={MAIN: first.revision})
    (renumbered,) = releases(tick(again, NOW + SECOND))
    assert renumbered.revision == 1011 + SKIPPED_REVISIONS


def test_a_device_that_lies_cannot_use_revisions_up_or_keep_a_fleet_busy():
    devices = fleet()
    c = coordinator(devices)
    order(c)
    published = []
    for k in range(100):
        revision = c.tracks[0].release.revision + 1
        lied = replace(devices[0], models=(replace(devices[0].models[0], revision=revision),))
        published += releases(c.handle(StatusSeen(lied), NOW + k * SECOND))
    assert len(published) == 1
    later = releases(tick(c, NOW + 3600 * SECOND))  # it may have been an honest one
    assert len(later) == 1
    absurd = report(c, devices[1:2], revision=2**63 - 1)
    assert not releases(absurd)
    assert "device dev-1 says that it follows revision 9223372036854775807" in warnings(absurd)[0]
    assert not warnings(report(c, devices[1:2], revision=2**63 - 1))
    report(c, devices[2:3], revision=HIGHEST)
    tick(c, NOW + 7200 * SECOND)
    assert c.tracks[0].release.revision == HIGHEST + SKIPPED_REVISIONS


# ── notes ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rollout_says_whom_its_stage_waits_for():
    devices = fleet(5)
    c = coordinator(devices)
    (first,) = releases(order(c, stages=[1.0]))
    report(c, devices[:1], serving=B, state="committed", **following(first))
    tick(c, NOW + SECOND)
    assert c.tracks[0].rollout.note == (
        "stage 1 of 1: everyone; 1 of 5 devices committed; 5 are needed, so it waits for dev-1, dev-2, dev-3 "
        "and 1 more"
    )
    assert not tick(c, NOW + 2 * SECOND)  # nothing new is not written down
    report(c, devices, serving=B, state="committed", **following(first))
    tick(c, NOW + 3 * SECOND)
    assert c.tracks[0].rollout.note == "stage 1 of 1: everyone"


def test_a_draft_for_a_cohort_that_nobody_follows_says_so():
    c = coordinator([*fleet(), device("else", cohort="beta")])
    order(c, cohort="mian")
    assert c.tracks[0].rollout.note == (
        "no device of cohort mian with model tiny is known, only in beta, main: it waits for one"
    )
    c = coordinator(fleet(2, online=False))
    order(c)
    assert c.tracks[0].rollout.note == "waits for one of 2 devices to be online"


def test_a_new_connection_hears_every_release_again():
    c = coordinator(fleet())
    assert not c.handle(core.Connected(), NOW)
    (published,) = releases(order(c))
    assert releases(c.handle(core.Connected(), NOW)) == [published]


def test_two_models_of_a_cohort_share_its_revisions():
    devices = [replace(d, models=(*d.models, replace(d.models[0], model="other"))) for d in fleet()]
    c = coordinator(devices)
    assert releases(order(c))[0].revision == 1
    assert releases(order(c, number=2, artifact="other", model="other"))[0].revision == 2
    assert releases(order(c, "halt", 3))[0].revision == 3


# ── what a status costs ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stages", [(1.0,), (0.5, 1.0)])
def test_a_device_that_comes_back_does_not_cost_a_look_at_the_fleet(monkeypatch, stages):
    """A site of thousands comes back at once; whether it is told to run the candidate takes a hash of each."""
    devices = fleet(300)
    c = coordinator(devices)
    order(c, stages=stages)
    hashed = []

    def stage_hash(*what):
        hashed.append(what)
        return release.stage_hash(*what)

    monkeypatch.setattr(rollout, "stage_hash", stage_hash)
    for d in devices:
        c.handle(StatusSeen(replace(d, online=False)), NOW)
        c.handle(StatusSeen(d), NOW)
    assert len(hashed) <= 300 + 2 * 2 * 300  # once for the fleet, then each device before and after


def test_a_draft_does_not_look_at_the_fleet_for_a_device_of_another_cohort(monkeypatch):
    devices = fleet(300)
    c = coordinator(devices)
    order(c, cohort="beta")
    asked = []
    plain = rollout.eligible

    def eligible(r, them):
        them = list(them)
        asked.extend(them)
        return plain(r, them)

    monkeypatch.setattr(rollout, "eligible", eligible)
    for d in devices:
        c.handle(StatusSeen(d), NOW)
    assert len(asked) <= 3 * 300
    assert releases(c.handle(StatusSeen(device("first", cohort="beta")), NOW))


REPORTS: st.SearchStrategy[dict[str, object]] = st.builds(
    dict,
    outcome=st.sampled_from(("",) * 12 + ("refused", "rolled_back")),
    outcome_digest=st.just(B),
    rollout=st.sampled_from(("r1", "r1", "r0")),
    revision=st.integers(0, 2),
)
OFTEN = st.integers(0, 4).map(bool)
STATUSES = st.tuples(st.integers(0, 7), OFTEN, st.sampled_from(("", "", "", "beta")), REPORTS, OFTEN)
"""(device, whether it is online, its cohort, what it reports, whether it has the model)"""


@settings(max_examples=300)
@given(
    statuses=st.lists(STATUSES, min_size=10, max_size=40),
    stages=st.sampled_from([(1, 3, 1.0), (3, 0.8, 1.0), (0.4, 1.0), (1.0,)]),
    failures=st.integers(0, 2),
    orders=st.dictionaries(
        st.integers(0, 39), st.sampled_from(("pause", "resume", "tick", "commit", "commit"))
    ),
)
def test_after_each_status_a_look_at_the_whole_fleet_would_change_nothing(statuses, stages, failures, orders):
    c = coordinator()
    order(c, name="r1", stages=stages, gates={"max_failures": failures, "bake_seconds": 0.0})
    known = {}
    for k, (number, online, cohort, fields, has_model) in enumerate(statuses):
        d = device(f"dev-{number}", online=online, cohort=cohort, **fields)
        d = d if has_model else replace(d, models=())
        known[d.device] = d
        was_draft = c.tracks[0].rollout.state == "draft"
        c.handle(StatusSeen(d), NOW + k)
        (track,) = c.tracks
        r = track.rollout
        if r.state == "draft":
            assert rollout.begin(r, known.values(), NOW) == r
        elif r.state in rollout.ACTIVE and not was_draft:  # one look begins a draft, the next one judges it
            assert rollout.tighten(r, known.values()) == r
            assert not gates.too_many_failed(r, gates.standing(r, rollout.members(r, known.values())))
        match orders.get(k):
            case "tick":
                tick(c, NOW + k)
            case "commit" if track.release is not None:
                good = {
                    "serving": B,
                    "state": "committed",
                    "rollout": "r1",
                    "revision": track.release.revision,
                }
                for d in known.values():
                    if d.models and desired(track.release, d.device) == B:
                        known[d.device] = replace(d, models=(replace(d.models[0], **good, outcome=""),))
                        c.handle(StatusSeen(known[d.device]), NOW + k)
                tick(c, NOW + k)
                tick(c, NOW + k)
            case None:
                pass
            case verb:
                order(c, verb, 100 + k)


def test_asks_name_both_arms():
    devices = fleet()
    c = coordinator([*devices, device("else", cohort="beta")])
    order(c)
    run_to_completion(c, devices)
    order(c, number=2, candidate=A, at=NOW + DAY)
    (ask,) = c.asks
    assert (ask.candidate, ask.incumbent) == (A, B)
    assert ask.candidate_since_ns == NOW + DAY
    assert ask.incumbent_since_ns == NOW + DAY - 3600 * SECOND
    assert {str(d) for d in ask.devices} == {str(d.device) for d in devices}


def test_candidate_of_reads_only_what_starts_a_rollout():
    assert requests.candidate_of(request()) == B
    assert requests.candidate_of(request("halt")) is None
    assert requests.candidate_of(request(candidate="xyz")) is None
    assert requests.candidate_of(replace(request(), document="[")) is None
