"""What the monitor remembers between looks (first looks, incidents, verdicts, cursors) and what it asks for."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Final

from sqlalchemy import delete, func, insert, select, update

from aggregator.adapters import documents
from aggregator.adapters.ledger import tables
from aggregator.adapters.ledger.control import Part
from aggregator.looks import Alarm, AlarmEvent, Look, Reading, Slice, Trace, Verdict
from aggregator.records import RetrainRequest
from edge_runtime.contract.ids import DeviceId, Digest, ModelName

CALM: Final = "the column looks as it did before"


class Drift(Part):
    """Looks, verdicts, incidents and retrain requests."""

    def put_verdicts(self, digest: Digest, verdicts: Iterable[Verdict]) -> None:
        """Writes what stands for an artifact, in the place of what stood."""
        t = tables.verdicts
        self._db.run(delete(t).where(t.c.digest == digest))
        for v in verdicts:
            key = {"digest": digest, "cohort": v.cohort, "kind": v.kind}
            seen = {"model": v.model, "at_ns": v.at_ns, "outcome": v.outcome, "reason": v.reason}
            self._db.run(insert(t), key | seen | {"document": documents.to_text(v)})

    def verdicts(self) -> tuple[Verdict, ...]:
        """Every standing verdict, newest look first, the fleet before its cohorts."""
        t = tables.verdicts
        order = (t.c.at_ns.desc(), t.c.cohort != "fleet", t.c.cohort, t.c.kind)
        rows = self._db.rows(select(t.c.document).order_by(*order))
        return tuple(documents.read_verdict(row.document) for row in rows)

    # ── looks ──────────────────────────────────────────────────────────────────────────────────────────

    def put_look(self, digest: Digest, model: ModelName, look: Look, at_ns: int, newest: int = 0) -> None:
        """Keeps what a look came to, for people, and the newest window that was part of it, for a replay."""
        shown = {
            "digest": digest,
            "look": look.index,
            "model": model,
            "at_ns": at_ns,
            "devices": look.devices,
            "row_count": look.rows,
            "newest": newest,
        }
        text = documents.look_text(look)
        self._db.upsert(tables.looks, shown | {"document": text})

    def prune_looks(self, before_ns: int) -> None:
        """Forgets looks taken before ``before_ns``, but each artifact's last, with which its next one goes on."""
        t, every = tables.looks, tables.looks.alias()
        last = select(func.max(every.c.look)).where(every.c.digest == t.c.digest).scalar_subquery()
        with self._db.transaction():
            self._db.run(delete(t).where(t.c.at_ns < before_ns, t.c.look < last))

    def next_look(self, digest: Digest) -> int:
        """The number of the artifact's next look."""
        t = tables.looks
        row = self._db.one(select(func.max(t.c.look).label("last")).where(t.c.digest == digest))
        return 0 if row is None or row.last is None else int(row.last) + 1

    def suspects(self, digest: Digest) -> dict[str, tuple[DeviceId, ...]]:
        """`Look.suspects` of the artifact's last look."""
        t = tables.looks
        query = select(t.c.document).where(t.c.digest == digest).order_by(t.c.look.desc()).limit(1)
        row = self._db.one(query)
        return documents.read_suspects(row.document) if row else {}

    def put_first_look(self, digest: Digest, one: Slice) -> None:
        """Keeps what devices without a past saw in a look: it is their past now."""
        for reading in one.readings:
            text = documents.reading_text(reading)
            key = {"digest": digest, "look": one.index, "device": reading.device}
            self._db.put_once(tables.first_looks, key | {"document": text})

    def first_looks(self, digest: Digest) -> tuple[Slice, ...]:
        """What was kept of the devices' first looks, oldest first."""
        t = tables.first_looks
        rows = self._db.rows(select(t).where(t.c.digest == digest).order_by(t.c.look, t.c.device))
        found: dict[int, list[Reading]] = {}
        for row in rows:
            found.setdefault(row.look, []).append(documents.read_reading(row.document))
        return tuple(
            Slice(
                index=number,
                start_ns=min(r.start_ns for r in readings),
                end_ns=max(r.end_ns for r in readings),
                readings=tuple(readings),
            )
            for number, readings in found.items()
        )

    # ── incidents ──────────────────────────────────────────────────────────────────────────────────────

    def put_traces(
        self, digest: Digest, model: ModelName, traces: Iterable[Trace], at_ns: int
    ) -> tuple[AlarmEvent, ...]:
        """Writes what is remembered of columns, opens and closes their incidents, and brings the open ones up to date.

        Returns what became of incidents, with their numbers.
        """
        known = self._traces(digest)
        events, changed = [], []
        told = partial(AlarmEvent, model=model, digest=digest, at_ns=at_ns)
        for trace in traces:
            before, number = known.get((trace.cohort, trace.key), (Trace(cohort="", key=""), None))
            if trace == before:
                continue
            was, now = before.alarm, trace.alarm
            if was is not None and number is not None and now is None:
                self._close(number, at_ns, CALM)
                events.append(told(what="closed", number=number, alarm=was, why=CALM))
                number = None
            elif now is not None and number is None:
                number = self._open(digest, model, trace, now, at_ns)
                events.append(told(what="opened", number=number, alarm=now, why=now.why))
            elif was is not None and now is not None and number is not None and now != was:
                self._update(number, now, at_ns)
                if now.severity == "page" != was.severity:
                    events.append(told(what="escalated", number=number, alarm=now, why=now.why))
            changed.append(
                {
                    "digest": digest,
                    "cohort": trace.cohort,
                    "column_key": trace.key,
                    "model": model,
                    "streak": trace.streak,
                    "clear": trace.clear,
                    "incident": number,
                }
            )
        if changed:
            self._db.upsert(tables.traces, changed)
        return tuple(events)

    def _open(self, digest: Digest, model: ModelName, trace: Trace, alarm: Alarm, at_ns: int) -> int:
        row = self._db.one(
            insert(tables.incidents).returning(tables.incidents.c.id),
            {
                "model": model,
                "digest": digest,
                "cohort": trace.cohort,
                "column_key": trace.key,
                "kind": alarm.kind,
                "severity": alarm.severity,
                "opened_ns": at_ns,
                "updated_ns": at_ns,
                "document": documents.to_text(alarm),
            },
        )
        assert row is not None
        return int(row.id)

    def _update(self, number: int, alarm: Alarm, at_ns: int) -> None:
        t = tables.incidents
        changed = {
            "kind": alarm.kind,
            "severity": alarm.severity,
            "updated_ns": at_ns,
            "document": documents.to_text(alarm),
        }
        self._db.run(update(t).where(t.c.id == number).values(changed))

    def _close(self, number: int, at_ns: int, why: str) -> None:
        t = tables.incidents
        self._db.run(update(t).where(t.c.id == number).values({"closed_ns": at_ns, "closed_why": why}))

    def _traces(self, digest: Digest) -> dict[tuple[str, str], tuple[Trace, int | None]]:
        t, i = tables.traces, tables.incidents
        query = select(t, i.c.document).select_from(t.outerjoin(i, t.c.incident == i.c.id))
        found = {}
        for row in self._db.rows(query.where(t.c.digest == digest).order_by(t.c.cohort, t.c.column_key)):
            trace = Trace(
                cohort=row.cohort,
                key=row.column_key,
                streak=row.streak,
                clear=row.clear,
                alarm=documents.read_alarm(row.document) if row.document else None,
            )
            found[row.cohort, row.column_key] = (trace, row.incident)
        return found

    def traces(self, digest: Digest) -> tuple[Trace, ...]:
        """What is remembered of the artifact's columns."""
        return tuple(trace for trace, _ in self._traces(digest).values())

    def alarming(self) -> tuple[tuple[Digest, ModelName], ...]:
        """The artifacts with an open incident."""
        t = tables.traces
        rows = self._db.rows(
            select(t.c.digest, t.c.model).where(t.c.incident.is_not(None)).distinct().order_by(t.c.digest)
        )
        return tuple((Digest(row.digest), ModelName(row.model)) for row in rows)

    def retire(
        self, digest: Digest, model: ModelName, trace: Trace, at_ns: int, why: str
    ) -> tuple[AlarmEvent, ...]:
        """Ends an incident that no look will ever clear, and the verdict that rests on it."""
        _, number = self._traces(digest).get((trace.cohort, trace.key), (None, None))
        t = tables.traces
        self._db.run(
            delete(t).where(t.c.digest == digest, t.c.cohort == trace.cohort, t.c.column_key == trace.key)
        )
        if trace.alarm is None or number is None:
            return ()
        self._close(number, at_ns, why)
        v = tables.verdicts
        self._db.run(
            delete(v).where(v.c.digest == digest, v.c.cohort == trace.cohort, v.c.kind == trace.alarm.kind)
        )
        return (
            AlarmEvent(
                what="closed",
                number=number,
                model=model,
                digest=digest,
                at_ns=at_ns,
                alarm=trace.alarm,
                why=why,
            ),
        )

    def acknowledge(self, number: int, *, by: str, at_ns: int) -> bool:
        """Somebody has seen an incident; False when there is none of that number that is open and not yet seen."""
        t = tables.incidents
        unseen = (t.c.id == number, t.c.closed_ns.is_(None), t.c.acknowledged_ns.is_(None))
        seen = {"acknowledged_ns": at_ns, "acknowledged_by": by}
        with self._db.transaction():
            row = self._db.one(update(t).where(*unseen).values(seen).returning(t.c.model))
            if row is not None:
                entry = {"at_ns": at_ns, "who": by, "what": f"acknowledged incident {number}", "why": ""}
                rest = {"cohort": "", "model": row.model, "rollout": ""}
                self._db.run(insert(tables.audit), entry | rest)
        return row is not None

    # ── what looks have used ───────────────────────────────────────────────────────────────────────────

    def amend_first_look(
        self, digest: Digest, look: int, device: DeviceId, *, labelled: int, correct: int
    ) -> None:
        """Adds late labels to what is kept of a device's first look, the past that it is held against."""
        t = tables.first_looks
        mine = (t.c.digest == digest, t.c.look == look, t.c.device == device)
        row = self._db.one(select(t.c.document).where(*mine))
        if row is None:
            raise KeyError((digest, look, device))
        kept = documents.read_reading(row.document)
        more = replace(kept, labelled=kept.labelled + labelled, correct=kept.correct + correct)
        self._db.run(update(t).where(*mine).values(document=documents.reading_text(more)))

    def put_label_cursor(self, digest: Digest, device: DeviceId, last: int) -> None:
        """A look has used the device's late labels up to ``last``."""
        self._db.upsert(tables.label_cursors, {"digest": digest, "device": device, "last": last})

    def label_cursors(self) -> dict[tuple[Digest, DeviceId], int]:
        """The newest late labels that a look has used, by artifact and device."""
        rows = self._db.rows(select(tables.label_cursors))
        return {(Digest(row.digest), DeviceId(row.device)): row.last for row in rows}

    def put_cursor(self, digest: Digest, device: DeviceId, last: int) -> None:
        """A look has used the device's windows up to ``last``."""
        self._db.upsert(tables.cursors, {"digest": digest, "device": device, "last": last})

    def cursors(self) -> dict[tuple[Digest, DeviceId], int]:
        """The newest window that a look has used, by artifact and device."""
        rows = self._db.rows(select(tables.cursors))
        return {(Digest(row.digest), DeviceId(row.device)): row.last for row in rows}

    # ── retraining ─────────────────────────────────────────────────────────────────────────────────────

    def put_retrain(self, r: RetrainRequest, state: str) -> int:
        """Keeps a request, ``waiting`` for its hook or only ``recorded``; returns its number."""
        row = self._db.one(
            insert(tables.retrains).returning(tables.retrains.c.id),
            {
                "model": r.model,
                "digest": r.digest,
                "cohort": r.cohort,
                "created_ns": r.at_ns,
                "why": r.why,
                "document": r.document,
                "state": state,
            },
        )
        assert row is not None
        return int(row.id)

    def move_retrain(
        self,
        number: int,
        state: str,
        *,
        exit_code: int | None = None,
        output: str = "",
        ended_ns: int | None = None,
    ) -> None:
        """Records what the hook does: ``running``, then ``done``, ``failed`` or ``interrupted``."""
        t = tables.retrains
        changed = {"state": state, "exit_code": exit_code, "output": output, "ended_ns": ended_ns}
        with self._db.transaction():
            self._db.run(update(t).where(t.c.id == number).values(changed))

    def retrains(self, state: str) -> tuple[tuple[int, str], ...]:
        """(number, document) of the requests in ``state``, oldest first."""
        t = tables.retrains
        rows = self._db.rows(select(t.c.id, t.c.document).where(t.c.state == state).order_by(t.c.id))
        return tuple((row.id, row.document) for row in rows)

    def asked(self, model: ModelName) -> tuple[frozenset[Digest], int | None]:
        """The artifacts of ``model`` that a request was made for, and when the newest was."""
        t = tables.retrains
        rows = self._db.rows(select(t.c.digest, t.c.created_ns).where(t.c.model == model))
        return frozenset(Digest(row.digest) for row in rows), max(
            (row.created_ns for row in rows), default=None
        )
