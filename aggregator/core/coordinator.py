"""Who should run what: ``handle(event, now) -> actions``, without a socket, a clock or a disk.

The service performs the actions of one call in order: everything to be saved in one transaction, then what is
to be published. So a revision is durable before any device can see it, and a release that was lost on the way
(a broker without persistence, a crash in between) is published again on the next connection.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from aggregator.config import RolloutConfig, read_gates, read_shadow, read_stages, read_trial
from aggregator.core import gates, rollout
from aggregator.core.exposure import Exposure
from aggregator.core.gates import Evidence
from aggregator.core.requests import START, read_request
from aggregator.core.revisions import Claim, Claims
from aggregator.records import DEFAULT_COHORT, AuditEntry, DeviceRecord, Request, Rollout, Track
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.fields import nearest
from edge_runtime.contract.ids import CohortId, DeviceId, Digest, FleetId, ModelName, RolloutId
from edge_runtime.contract.release import Release

ORDERS = {"halt": "halt", "rollback": "roll_back", "pause": "pause", "resume": "resume"}
KINDS = (START, *ORDERS)
GATEKEEPER = "coordinator"


@dataclass(frozen=True, slots=True)
class Connected:
    """The link is up: whatever the broker has forgotten has to be said again."""


@dataclass(frozen=True, slots=True)
class StatusSeen:
    """What is known of a device changed."""

    record: DeviceRecord


@dataclass(frozen=True, slots=True)
class RequestSeen:
    """An order from the ledger. ``artifact`` is the model family of the digest it names, None when that is
    unknown here; ``published`` whether the publisher vouches for it, None where nobody can say; ``namesake`` the
    rollout of the name that it asks for (`requests.name_of`), None when there never was one; ``unsigned`` why no
    device would take a release that is signed here, empty when there is no such reason.
    """

    request: Request
    artifact: ModelName | None = None
    published: bool | None = None
    namesake: Rollout | None = None
    unsigned: str = ""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; ``evidence`` has the arms of every rollout in `Coordinator.asks`."""

    evidence: Mapping[RolloutId, Evidence]


Event = Connected | StatusSeen | RequestSeen | Tick


@dataclass(frozen=True, slots=True)
class Save:
    """Make the track durable, and with it the cohort's revision when it has a release."""

    track: Track


@dataclass(frozen=True, slots=True)
class Audit:
    """Append to the audit log."""

    entry: AuditEntry


@dataclass(frozen=True, slots=True)
class Answer:
    """Tell whoever wrote the request what became of it."""

    number: int
    accepted: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Sign and publish the release, after everything was saved."""

    release: Release


@dataclass(frozen=True, slots=True)
class Warn:
    """Tell whoever reads the log."""

    text: str


Kept = Save | Audit | Answer
Action = Kept | Publish | Warn


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """The evidence a running rollout needs: windows of both arms, received since these times."""

    rollout: RolloutId
    model: ModelName
    candidate: Digest
    candidate_since_ns: int
    incumbent: Digest | None
    incumbent_since_ns: int
    devices: tuple[DeviceId, ...]


class Coordinator:
    """The releases of one fleet. Built from what the ledger kept; not thread-safe, one loop owns it."""

    def __init__(
        self,
        fleet: FleetId,
        defaults: RolloutConfig,
        *,
        tracks: Iterable[Track] = (),
        revisions: Mapping[CohortId, int] | None = None,
        cohorts: Mapping[RolloutId, CohortId] | None = None,
        devices: Iterable[DeviceRecord] = (),
    ) -> None:
        self._fleet = fleet
        self._defaults = defaults
        tracks = tuple(tracks)
        self._tracks = {(track.cohort, track.model): track for track in tracks}
        self._revisions = dict(revisions or {})
        self._cohorts = {**(cohorts or {}), **{t.rollout.rollout: t.cohort for t in tracks if t.rollout}}
        self._devices: dict[DeviceId, DeviceRecord] = {record.device: record for record in devices}
        self._claims = Claims()
        for record in self._devices.values():
            self._saw(record)
        self._exposures: dict[tuple[CohortId, ModelName], Exposure] = {}

    @property
    def tracks(self) -> tuple[Track, ...]:
        """The control state, as it was last handed out in a `Save`."""
        return tuple(self._tracks.values())

    @property
    def asks(self) -> tuple[Ask, ...]:
        """What the next `Tick` should bring."""
        found = []
        for track in self._tracks.values():
            r = track.rollout
            if r is not None and r.state in (rollout.RUNNING, rollout.PAUSED):
                found.append(
                    Ask(
                        rollout=r.rollout,
                        model=r.model,
                        candidate=r.candidate,
                        candidate_since_ns=r.stage_since_ns,
                        incumbent=r.incumbent,
                        incumbent_since_ns=max(0, r.created_ns - int(r.gates.control_seconds * 1e9)),
                        devices=tuple(d.device for d in rollout.eligible(r, self._devices.values())),
                    )
                )
        return tuple(found)

    def handle(self, event: Event, now_ns: int) -> list[Action]:
        """What to do about ``event``, in order; ``now_ns`` is wall time since 1970."""
        match event:
            case Connected():
                return [Publish(t.release) for t in self._tracks.values() if t.release is not None]
            case StatusSeen():
                before = self._devices.get(event.record.device)
                self._devices[event.record.device] = event.record
                actions = self._catch_up(self._saw(event.record), now_ns)
                return actions + self._over_active(partial(self._status_seen, before, event.record), now_ns)
            case RequestSeen():
                return self._request(event, now_ns)
            case Tick():
                actions = self._catch_up(None, now_ns)
                actions += self._over_active(self._status_changed, now_ns)
                return actions + self._over_active(
                    lambda r, now: self._ticked(r, event.evidence.get(r.rollout, Evidence()), now), now_ns
                )

    def _over_active(self, react: Callable[[Rollout, int], list[Action]], now_ns: int) -> list[Action]:
        actions: list[Action] = []
        for track in tuple(self._tracks.values()):
            if track.rollout is not None and track.rollout.state in rollout.ACTIVE:
                actions += react(track.rollout, now_ns)
        return actions

    # ── what this ledger forgot ────────────────────────────────────────────────────────────────────────

    def _catch_up(self, absurd: Claim | None, now_ns: int) -> list[Action]:
        """Publishes under a higher revision what devices refuse, because they follow a later one than this ledger's."""
        actions: list[Action] = []
        if absurd is not None:
            actions.append(Warn(absurd.beyond_belief()))
        for family, track in tuple(self._tracks.items()):
            if track.release is None or not self._claims.refused(family, track.release.revision, now_ns):
                continue
            self._claims.renewed(family, now_ns)
            revision, told = self._next_revision(track.cohort)
            release, r = replace(track.release, revision=revision), track.rollout
            # Reports under this rollout's name and an older number may be of a namesake that was forgotten too.
            renewed = replace(track, release=release, rollout=r and replace(r, revision=revision))
            self._tracks[family] = renewed
            why = f"revision {track.release.revision} is published again as {revision}"
            audit = (
                [self._audit(renewed.rollout, GATEKEEPER, "renumber", why, now_ns)] if renewed.rollout else []
            )
            actions += [Save(renewed), *audit, *told, Publish(release)]
        return actions

    def _saw(self, record: DeviceRecord) -> Claim | None:
        """`Claims.saw`; a rollout that this ledger forgot may have been of any cohort."""
        of = self._cohorts
        named = (report.rollout for report in record.models)
        elsewhere = frozenset(r for r in named if r and of.get(RolloutId(r), record.cohort) != record.cohort)
        return self._claims.saw(record, elsewhere, self._revisions.get(CohortId(record.cohort), 0))

    def _next_revision(self, cohort: CohortId) -> tuple[int, list[Action]]:
        known = self._revisions.get(cohort, 0)
        revision, claim = self._claims.next(cohort, known)
        self._revisions[cohort] = revision
        return revision, [] if claim is None else [Warn(claim.forgotten(cohort, known, revision))]

    # ── what devices and time bring ────────────────────────────────────────────────────────────────────

    def _status_seen(
        self, before: DeviceRecord | None, record: DeviceRecord, r: Rollout, now_ns: int
    ) -> list[Action]:
        """Looks at the whole fleet only when that changes anything: a status must not cost a fleet."""
        kept = self._exposures.get((r.cohort, r.model))
        if kept is not None and kept.stands_for(r):
            kept.saw(before, record)
        else:
            kept = self._exposures[r.cohort, r.model] = Exposure(r, self._devices.values())
        return self._status_changed(r, now_ns) if kept.calls(r) else []

    def _status_changed(self, r: Rollout, now_ns: int) -> list[Action]:
        known = self._devices.values()
        if r.state == rollout.DRAFT:
            return self._begin(r, now_ns)
        tight = rollout.tighten(r, known)
        actions: list[Action] = []
        if tight != r:
            why = f"more than {r.cap} devices of stage {r.stage} are online"
            actions += self._change(tight, GATEKEEPER, "tighten", why, now_ns)
        failed = gates.too_many_failed(tight, gates.standing(tight, rollout.members(tight, known)))
        if failed:
            actions += self._change(rollout.end(tight, "halt", failed), GATEKEEPER, "halt", failed, now_ns)
        return actions

    def _begin(self, r: Rollout, now_ns: int) -> list[Action]:
        begun = rollout.begin(r, self._devices.values(), now_ns)
        return [] if begun == r else self._change(begun, GATEKEEPER, "begin", begun.note, now_ns)

    def _ticked(self, r: Rollout, evidence: Evidence, now_ns: int) -> list[Action]:
        if r.state == rollout.DRAFT:
            return []
        stand = gates.standing(r, rollout.members(r, self._devices.values()))
        outcome = gates.judge(r, stand, evidence, now_ns)
        if outcome.action == gates.HALT:
            return self._change(rollout.end(r, "halt", outcome.why), GATEKEEPER, "halt", outcome.why, now_ns)
        if r.state == rollout.PAUSED:
            return []
        if outcome.action == gates.GO:
            return self._advance(r, outcome.why, now_ns)
        if now_ns >= r.stage_since_ns + int(r.gates.timeout_seconds * 1e9):
            why = f"stage {r.stage} was not through in {r.gates.timeout_seconds:.0f} s: {outcome.why}"
            return self._change(rollout.pause(r, why), GATEKEEPER, "pause", why, now_ns)
        return self._note(r, outcome, now_ns)

    def _advance(self, r: Rollout, why: str, now_ns: int) -> list[Action]:
        if r.stage == len(r.stages):
            return self._change(rollout.end(r, "finish", why), GATEKEEPER, "finish", why, now_ns)
        following = rollout.advance(r, self._devices.values(), now_ns)
        return [] if following == r else self._change(following, GATEKEEPER, "advance", why, now_ns)

    def _note(self, r: Rollout, outcome: gates.Outcome, now_ns: int) -> list[Action]:
        """Remembers since when the stage is ready, so that a restart does not bake it anew, and whom it waits for."""
        since = (r.ready_since_ns or now_ns) if outcome.ready else None
        note = rollout.describe(r, r.stage, r.cap)
        changed = replace(r, ready_since_ns=since, note=note if outcome.ready else f"{note}; {outcome.why}")
        return [] if changed == r else self._keep(changed)

    # ── orders ─────────────────────────────────────────────────────────────────────────────────────────

    def _request(self, event: RequestSeen, now_ns: int) -> list[Action]:
        request = event.request
        try:
            return self._start(event, now_ns) if request.kind == START else self._order(event, now_ns)
        except ContractError as e:
            who = request.by or "unknown"
            entry = AuditEntry(at_ns=now_ns, who=who, what=f"refused {request.kind}", why=str(e))
            return [Answer(request.number, accepted=False, reason=str(e)), Audit(entry)]

    def _start(self, event: RequestSeen, now_ns: int) -> list[Action]:
        request = event.request
        self._refuse_unsigned(event)
        f = read_request(request)
        cohort = ids.cohort_id(f.text("cohort", DEFAULT_COHORT))
        model = ids.model_name(f.text("model"))
        candidate = ids.digest(f.text("candidate"))
        name = f.text("name", "") or f"{model[:32]}-{now_ns // 1_000_000_000:x}-{request.number}"
        track = self._tracks.get((cohort, model), Track(cohort=cohort, model=model))
        incumbent = track.release.incumbent if track.release else None
        wished = Rollout(
            rollout=ids.rollout_id(name),
            cohort=cohort,
            model=model,
            candidate=candidate,
            incumbent=incumbent,
            stages=read_stages(f, "stages", self._defaults.stages),
            gates=read_gates(f.section("gates", {}), self._defaults.gates),
            trial=read_trial(f.section("trial", {}), self._defaults.trial),
            shadow=read_shadow(f.section("shadow", {}), self._defaults.shadow),
            attempt=f.integer("attempt", 1, low=1),
            by=request.by,
            why=request.why,
            created_ns=now_ns,
        )
        f.finish()
        if event.artifact is None:
            raise ContractError(f"no artifact {candidate} in the registry: publish it first")
        if event.published is False:
            raise ContractError(
                f"{candidate} is not published, or was revoked, so no device would run it: publish it first, with "
                "`skiff publish`"
            )
        if event.artifact != model:
            raise ContractError(f"artifact {candidate} is a model of {event.artifact}, not of {model}")
        if track.rollout is not None and track.rollout.state in rollout.ACTIVE:
            raise ContractError(
                f"rollout {track.rollout.rollout} of {model} in cohort {cohort} is {track.rollout.state}: "
                "halt it first, or wait for it to complete"
            )
        if candidate == incumbent:
            raise ContractError(f"{candidate} is what cohort {cohort} runs already")
        self._refuse_namesake(wished, event.namesake)
        wished = replace(wished, note=rollout.draft_note(wished, self._devices.values()))
        actions: list[Action] = [Answer(request.number, accepted=True, reason=wished.rollout)]
        actions += self._keep(wished)
        actions.append(self._audit(wished, request.by, "start", request.why, now_ns))
        return actions + self._begin(wished, now_ns)

    @staticmethod
    def _refuse_unsigned(event: RequestSeen) -> None:
        """What is decided must reach devices: who orders a halt must not believe that they have heard it."""
        if event.unsigned:
            raise ContractError(event.unsigned)

    def _refuse_namesake(self, wished: Rollout, namesake: Rollout | None) -> None:
        """Devices, evidence and the ledger know a rollout by its name alone."""
        known = (track.rollout for track in self._tracks.values())
        for r in (*known, namesake):
            if r is not None and r.rollout == wished.rollout:
                raise ContractError(
                    f"rollout name {r.rollout} was used before, for {r.model} in cohort {r.cohort} ({r.state}): choose "
                    "another, or leave the name out"
                )

    def _order(self, event: RequestSeen, now_ns: int) -> list[Action]:
        request = event.request
        self._refuse_unsigned(event)
        if request.kind not in ORDERS:
            raise ContractError(f"unknown request {request.kind!r}{nearest(request.kind, KINDS)}")
        f = read_request(request)
        cohort = ids.cohort_id(f.text("cohort", DEFAULT_COHORT))
        model = ids.model_name(f.text("model"))
        f.finish()
        track = self._tracks.get((cohort, model))
        if track is None or track.rollout is None:
            raise ContractError(f"there was never a rollout of {model} in cohort {cohort}")
        r, verb, note = track.rollout, ORDERS[request.kind], f"{request.by}: {request.why}"
        if verb == "pause":
            changed = rollout.pause(r, note)
        elif verb == "resume":
            changed = rollout.resume(r, note, now_ns)
        else:
            if r.state == rollout.COMPLETED and r.incumbent is None:
                raise ContractError(
                    f"{model} had no model before rollout {r.rollout}: there is nothing to go back to"
                )
            changed = rollout.end(r, verb, note)
        accepted = Answer(request.number, accepted=True, reason=changed.rollout)
        return [accepted, *self._change(changed, request.by, request.kind, request.why, now_ns)]

    # ── what leaves ────────────────────────────────────────────────────────────────────────────────────

    def _keep(self, r: Rollout, release: Release | None = None) -> list[Action]:
        before = self._tracks.get((r.cohort, r.model))
        kept = release or (before.release if before else None)
        track = Track(cohort=r.cohort, model=r.model, release=kept, rollout=r)
        self._tracks[r.cohort, r.model] = track
        self._cohorts[r.rollout] = r.cohort
        return [Save(track)]

    def _change(self, r: Rollout, who: str, what: str, why: str, now_ns: int) -> list[Action]:
        """Saves ``r``; when it means another release than the one in force, that too, under a higher revision."""
        before = self._tracks[r.cohort, r.model].release
        audit = self._audit(r, who, what, why, now_ns)
        if before is None and r.threshold == 0 and r.state != rollout.COMPLETED:
            return [*self._keep(r), audit]
        release = rollout.release_of(r, self._fleet, before.revision if before else 0)
        if release == before:
            return [*self._keep(r), audit]
        revision, told = self._next_revision(r.cohort)
        release = replace(release, revision=revision)
        r = replace(r, revision=revision if told else r.revision or revision)
        return [*self._keep(r, release), audit, *told, Publish(release)]

    @staticmethod
    def _audit(r: Rollout, who: str, what: str, why: str, now_ns: int) -> Audit:
        return Audit(
            AuditEntry(
                at_ns=now_ns, who=who, what=what, why=why, cohort=r.cohort, model=r.model, rollout=r.rollout
            )
        )
