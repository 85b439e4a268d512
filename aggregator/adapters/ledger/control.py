"""What rollouts are controlled by: devices, releases, rollouts, the audit log, and orders from outside."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import case, insert, select, update

from aggregator.adapters import documents
from aggregator.adapters.ledger import tables
from aggregator.adapters.ledger.database import Database
from aggregator.records import AuditEntry, DeviceRecord, Request, Rollout, Track
from edge_runtime.contract import ids, release
from edge_runtime.contract.ids import CohortId, RolloutId

TAKEN: Final = "taken"
"""What stands in the place of an answer while an order is handled."""


class Part:
    """Some of the ledger's methods; all parts share one database."""

    def __init__(self, db: Database) -> None:
        self._db = db


class Control(Part):
    """The control state proper."""

    def close(self) -> None:
        """Lets go of the database."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything put inside is committed together, durable at the end, or, when it raises, not at all."""
        with self._db.transaction():
            yield

    # ── devices ────────────────────────────────────────────────────────────────────────────────────────

    def put_device(self, r: DeviceRecord) -> None:
        """Writes one device."""
        self._db.upsert(
            tables.devices,
            {
                "device": r.device,
                "session": r.session,
                "seq": r.seq,
                "online": int(r.online),
                "attributes": json.dumps(dict(r.attributes), sort_keys=True),
                "models": documents.list_text(r.models),
                "last_seen_ns": r.last_seen_ns,
                "ended": json.dumps(r.ended),
                "doubted_ns": r.doubted_ns,
                "last_exit": r.last_exit,
                "restarts": r.restarts,
                "clock": r.clock,
            },
        )

    def devices(self) -> tuple[DeviceRecord, ...]:
        """Every device that ever spoke, sorted."""
        rows = self._db.rows(select(tables.devices).order_by(tables.devices.c.device))
        return tuple(
            DeviceRecord(
                device=ids.device_id(row.device),
                session=ids.session_id(row.session),
                seq=row.seq,
                online=bool(row.online),
                attributes=tuple(sorted(json.loads(row.attributes).items())),
                models=documents.read_reports(row.models),
                last_seen_ns=row.last_seen_ns,
                ended=documents.read_ended(row.ended),
                doubted_ns=row.doubted_ns,
                last_exit=row.last_exit,
                restarts=row.restarts,
                clock=row.clock,
            )
            for row in rows
        )

    # ── releases and rollouts ──────────────────────────────────────────────────────────────────────────

    def put_track(self, track: Track) -> None:
        """Writes a track, its rollout, and its cohort's revision, which never falls."""
        payload = release.to_payload(track.release) if track.release else None
        text = documents.to_text(track.rollout) if track.rollout else None
        self._db.upsert(
            tables.tracks,
            {"cohort": track.cohort, "model": track.model, "release": payload, "rollout": text},
        )
        if track.release is not None:
            self._put_revision(track.cohort, track.release.revision)
        if track.rollout is not None:
            r = track.rollout
            self._db.upsert(
                tables.rollouts,
                {
                    "rollout": r.rollout,
                    "cohort": r.cohort,
                    "model": r.model,
                    "state": r.state,
                    "created_ns": r.created_ns,
                    "document": text,
                },
            )

    def _put_revision(self, cohort: CohortId, revision: int) -> None:
        kept, statement = tables.revisions.c.revision, self._db.insert(tables.revisions)
        new = statement.excluded.revision
        self._db.run(
            statement.on_conflict_do_update(
                index_elements=["cohort"], set_={"revision": case((new > kept, new), else_=kept)}
            ),
            {"cohort": cohort, "revision": revision},
        )

    def tracks(self) -> tuple[Track, ...]:
        """Every cohort and model's control state."""
        t = tables.tracks
        return tuple(
            Track(
                cohort=ids.cohort_id(row.cohort),
                model=ids.model_name(row.model),
                release=release.from_payload(row.release) if row.release else None,
                rollout=documents.read_rollout(row.rollout) if row.rollout else None,
            )
            for row in self._db.rows(select(t).order_by(t.c.cohort, t.c.model))
        )

    def revisions(self) -> dict[CohortId, int]:
        """The highest revision ever saved, by cohort."""
        return {ids.cohort_id(row.cohort): row.revision for row in self._db.rows(select(tables.revisions))}

    def cohorts(self) -> dict[RolloutId, CohortId]:
        """The cohort of every rollout there was."""
        t = tables.rollouts
        rows = self._db.rows(select(t.c.rollout, t.c.cohort))
        return {ids.rollout_id(row.rollout): ids.cohort_id(row.cohort) for row in rows}

    def skip_revisions(self, count: int) -> None:
        """Raises every cohort's revision, so that the next release is newer than ``count`` that this ledger forgot."""
        t = tables.revisions
        self._db.run(update(t).values(revision=t.c.revision + count))

    def rollout(self, name: str) -> Rollout | None:
        """A rollout by its name, finished ones too."""
        t = tables.rollouts
        row = self._db.one(select(t.c.document).where(t.c.rollout == name))
        return documents.read_rollout(row.document) if row else None

    def put_audit(self, e: AuditEntry) -> None:
        """Appends to the audit log."""
        self._db.run(
            insert(tables.audit),
            {
                "at_ns": e.at_ns,
                "who": e.who,
                "what": e.what,
                "why": e.why,
                "cohort": e.cohort,
                "model": e.model,
                "rollout": e.rollout,
            },
        )

    # ── orders from outside ────────────────────────────────────────────────────────────────────────────

    def request(self, kind: str, document: Mapping[str, object], *, by: str, why: str, now_ns: int) -> int:
        """Leaves an order for the service, in a transaction of its own, and returns its number."""
        with self._db.transaction():
            row = self._db.one(
                insert(tables.requests).returning(tables.requests.c.id),
                {
                    "kind": kind,
                    "document": json.dumps(document, sort_keys=True),
                    "who": by,
                    "why": why,
                    "created_ns": now_ns,
                },
            )
        assert row is not None
        return int(row.id)

    def answer(self, number: int) -> tuple[str, str]:
        """(``pending``, ``accepted``, ``refused`` or ``withdrawn``; the reason or the rollout's name).

        An order that `pending` has returned is ``pending`` with `TAKEN` beside it. KeyError when unknown.
        """
        t = tables.requests
        row = self._db.one(select(t.c.state, t.c.answer).where(t.c.id == number))
        if row is None:
            raise KeyError(number)
        return row.state, row.answer

    def pending(self) -> tuple[Request, ...]:
        """The orders nobody has answered yet, oldest first; from now on nobody can withdraw them."""
        t = tables.requests
        waiting = select(t).where(t.c.state == "pending").order_by(t.c.id).limit(100)
        rows = self._db.rows(waiting)
        if any(row.answer != TAKEN for row in rows):
            with self._db.transaction():
                self._db.run(update(t).where(t.c.state == "pending").values(answer=TAKEN))
                rows = self._db.rows(waiting.where(t.c.answer == TAKEN))
        return tuple(
            Request(
                number=row.id,
                kind=row.kind,
                document=row.document,
                by=row.who,
                why=row.why,
                created_ns=row.created_ns,
            )
            for row in rows
        )

    def withdraw(self, number: int) -> tuple[str, str]:
        """Takes an order back unless somebody has taken it, in a transaction of its own; what `answer` says then."""
        t = tables.requests
        mine = (t.c.id == number, t.c.state == "pending", t.c.answer != TAKEN)
        with self._db.transaction():
            self._db.run(update(t).where(*mine).values(state="withdrawn"))
            return self.answer(number)

    def put_answer(self, number: int, *, accepted: bool, reason: str) -> None:
        """Answers an order."""
        t = tables.requests
        state = "accepted" if accepted else "refused"
        self._db.run(update(t).where(t.c.id == number).values(state=state, answer=reason))

    # ── questions of people ────────────────────────────────────────────────────────────────────────────

    def table(self, name: str, limit: int = 100) -> tuple[dict[str, Any], ...]:
        """The newest rows of ``audit``, ``rollouts``, ``verdicts``, ``looks``, ``incidents``, ``open_incidents``,
        ``tellings``, ``retrains`` or ``requests``; a column named ``document`` is parsed from JSON. Without
        documents: ``look_times``, ``verdict_outcomes``, ``open_severities`` and ``retrain_states``.
        """
        return tuple(
            {k: json.loads(v) if k in tables.PARSED else v for k, v in row._mapping.items()}  # noqa: SLF001 (public)
            for row in self._db.rows(tables.LISTED[name].limit(limit))
        )
