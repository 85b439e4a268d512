"""The control state: devices, releases, rollouts, the audit log, verdicts and incidents, retrain requests, orders.

The service is its one writer, except for `request`, with which the command line leaves an order. Every method
that changes something is one transaction; `save` takes many changes into one.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from aggregator.adapters import documents
from aggregator.adapters.database import connect, transaction
from aggregator.records import (
    AuditEntry,
    DeviceRecord,
    Request,
    RetrainRequest,
    Rollout,
    Track,
    Trail,
    Unit,
    Verdict,
)
from edge_runtime.contract import ids, release
from edge_runtime.contract.ids import CohortId, DeviceId, Digest, ModelName
from edge_runtime.contract.profile import Profile

VERSION: Final = 2
STEPS: Final = {
    1: "ALTER TABLE devices ADD COLUMN last_exit TEXT NOT NULL DEFAULT '';"
    "ALTER TABLE devices ADD COLUMN restarts INTEGER NOT NULL DEFAULT 0;"
    "ALTER TABLE devices ADD COLUMN clock TEXT NOT NULL DEFAULT ''"
}

SCHEMA: Final = """
CREATE TABLE devices (
  device TEXT PRIMARY KEY, session TEXT NOT NULL, seq INTEGER NOT NULL, online INTEGER NOT NULL,
  attributes TEXT NOT NULL, models TEXT NOT NULL, last_seen_ns INTEGER NOT NULL, ended TEXT NOT NULL,
  doubted_ns INTEGER NOT NULL, last_exit TEXT NOT NULL DEFAULT '', restarts INTEGER NOT NULL DEFAULT 0,
  clock TEXT NOT NULL DEFAULT '') WITHOUT ROWID;
CREATE TABLE tracks (
  cohort TEXT NOT NULL, model TEXT NOT NULL, release BLOB, rollout TEXT, PRIMARY KEY (cohort, model)) WITHOUT ROWID;
CREATE TABLE revisions (cohort TEXT PRIMARY KEY, revision INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE rollouts (
  rollout TEXT PRIMARY KEY, cohort TEXT NOT NULL, model TEXT NOT NULL, state TEXT NOT NULL,
  created_ns INTEGER NOT NULL, document TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE audit (
  id INTEGER PRIMARY KEY, at_ns INTEGER NOT NULL, who TEXT NOT NULL, what TEXT NOT NULL, why TEXT NOT NULL,
  cohort TEXT NOT NULL, model TEXT NOT NULL, rollout TEXT NOT NULL);
CREATE TABLE requests (
  id INTEGER PRIMARY KEY, kind TEXT NOT NULL, document TEXT NOT NULL, who TEXT NOT NULL, why TEXT NOT NULL,
  created_ns INTEGER NOT NULL, state TEXT NOT NULL DEFAULT 'pending', answer TEXT NOT NULL DEFAULT '');
CREATE INDEX requests_pending ON requests (id) WHERE state='pending';
CREATE TABLE verdicts (
  digest TEXT NOT NULL, cohort TEXT NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL, at_ns INTEGER NOT NULL,
  outcome TEXT NOT NULL, reason TEXT NOT NULL, streak INTEGER NOT NULL, clear INTEGER NOT NULL,
  incident INTEGER NOT NULL, document TEXT NOT NULL, PRIMARY KEY (digest, cohort, kind)) WITHOUT ROWID;
CREATE TABLE looks (
  id INTEGER PRIMARY KEY, at_ns INTEGER NOT NULL, model TEXT NOT NULL, digest TEXT NOT NULL, cohort TEXT NOT NULL,
  kind TEXT NOT NULL, outcome TEXT NOT NULL, judged TEXT NOT NULL, p REAL NOT NULL, reason TEXT NOT NULL,
  moved TEXT NOT NULL);
CREATE TABLE cursors (
  digest TEXT NOT NULL, device TEXT NOT NULL, last INTEGER NOT NULL, PRIMARY KEY (digest, device)) WITHOUT ROWID;
CREATE TABLE incidents (
  id INTEGER PRIMARY KEY, model TEXT NOT NULL, digest TEXT NOT NULL, cohort TEXT NOT NULL, kind TEXT NOT NULL,
  opened_ns INTEGER NOT NULL, updated_ns INTEGER NOT NULL, closed_ns INTEGER, closed_why TEXT NOT NULL DEFAULT '',
  columns TEXT NOT NULL, document TEXT NOT NULL);
CREATE UNIQUE INDEX incidents_open ON incidents (digest, cohort, kind) WHERE closed_ns IS NULL;
CREATE TABLE origins (
  digest TEXT NOT NULL, device TEXT NOT NULL, document TEXT NOT NULL, PRIMARY KEY (digest, device)) WITHOUT ROWID;
CREATE TABLE baselines (digest TEXT PRIMARY KEY, at_ns INTEGER NOT NULL, document TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE retrains (
  id INTEGER PRIMARY KEY, model TEXT NOT NULL, digest TEXT NOT NULL, cohort TEXT NOT NULL, created_ns INTEGER NOT NULL,
  why TEXT NOT NULL, document TEXT NOT NULL, state TEXT NOT NULL, exit_code INTEGER, output TEXT NOT NULL DEFAULT '',
  ended_ns INTEGER)
"""

QUERIES: Final = {
    "audit": "SELECT at_ns, who, what, why, cohort, model, rollout FROM audit ORDER BY id DESC LIMIT ?",
    "rollouts": (
        "SELECT rollout, cohort, model, state, created_ns, document FROM rollouts"
        " ORDER BY created_ns DESC, rollout LIMIT ?"
    ),
    "verdicts": (
        "SELECT model, digest, cohort, kind, at_ns, outcome, reason, streak, clear, incident, document FROM verdicts"
        " ORDER BY at_ns DESC, cohort, kind LIMIT ?"
    ),
    "looks": (
        "SELECT at_ns, model, digest, cohort, kind, outcome, judged, p, reason, moved FROM looks"
        " ORDER BY id DESC LIMIT ?"
    ),
    "incidents": (
        "SELECT id, model, digest, cohort, kind, opened_ns, updated_ns, closed_ns, closed_why, columns, document"
        " FROM incidents ORDER BY id DESC LIMIT ?"
    ),
    "retrains": (
        "SELECT id, model, digest, cohort, created_ns, why, state, exit_code, output, ended_ns, document FROM retrains"
        " ORDER BY id DESC LIMIT ?"
    ),
    "requests": "SELECT id, kind, document, who, why, created_ns, state, answer FROM requests ORDER BY id DESC LIMIT ?",
}


class Ledger:
    """The store at ``path``; ``read_only`` for another process that only asks. Not thread-safe."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._db = connect(path, SCHEMA, VERSION, read_only=read_only, steps=STEPS)

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything put inside is committed together, durable at the end, or, when it raises, not at all."""
        with transaction(self._db):
            yield

    # ── devices ────────────────────────────────────────────────────────────────────────────────────────

    def put_device(self, r: DeviceRecord) -> None:
        """Writes one device; call it in a `transaction`."""
        self._db.execute(
            "INSERT OR REPLACE INTO devices VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                *(r.device, r.session, r.seq, r.online, json.dumps(dict(r.attributes), sort_keys=True)),
                *(documents.list_text(r.models), r.last_seen_ns, json.dumps(r.ended), r.doubted_ns),
                *(r.last_exit, r.restarts, r.clock),
            ),
        )

    def devices(self) -> tuple[DeviceRecord, ...]:
        """Every device that ever spoke, sorted."""
        rows = self._db.execute("SELECT * FROM devices ORDER BY device")
        return tuple(
            DeviceRecord(
                device=ids.device_id(row[0]),
                session=ids.session_id(row[1]),
                seq=row[2],
                online=bool(row[3]),
                attributes=tuple(sorted(json.loads(row[4]).items())),
                models=documents.read_reports(row[5]),
                last_seen_ns=row[6],
                ended=tuple(ids.session_id(s) for s in json.loads(row[7])),
                doubted_ns=row[8],
                last_exit=row[9],
                restarts=row[10],
                clock=row[11],
            )
            for row in rows
        )

    # ── releases and rollouts ──────────────────────────────────────────────────────────────────────────

    def put_track(self, track: Track) -> None:
        """Writes a track, its rollout, and its cohort's revision, which never falls; call it within `save`."""
        payload = release.to_payload(track.release) if track.release else None
        text = documents.to_text(track.rollout) if track.rollout else None
        self._db.execute(
            "INSERT OR REPLACE INTO tracks VALUES (?,?,?,?)", (track.cohort, track.model, payload, text)
        )
        if track.release is not None:
            self._db.execute(
                "INSERT INTO revisions VALUES (?,?) ON CONFLICT (cohort) DO UPDATE"
                " SET revision=MAX(revision, excluded.revision)",
                (track.cohort, track.release.revision),
            )
        if track.rollout is not None:
            r = track.rollout
            self._db.execute(
                "INSERT OR REPLACE INTO rollouts VALUES (?,?,?,?,?,?)",
                (r.rollout, r.cohort, r.model, r.state, r.created_ns, text),
            )

    def tracks(self) -> tuple[Track, ...]:
        """Every cohort and model's control state."""
        rows = self._db.execute("SELECT cohort, model, release, rollout FROM tracks ORDER BY cohort, model")
        return tuple(
            Track(
                cohort=ids.cohort_id(row[0]),
                model=ids.model_name(row[1]),
                release=release.from_payload(row[2]) if row[2] else None,
                rollout=documents.read_rollout(row[3]) if row[3] else None,
            )
            for row in rows
        )

    def revisions(self) -> dict[CohortId, int]:
        """The highest revision ever saved, by cohort."""
        return {ids.cohort_id(c): r for c, r in self._db.execute("SELECT cohort, revision FROM revisions")}

    def rollout(self, name: str) -> Rollout | None:
        """A rollout by its name, finished ones too."""
        row = self._db.execute("SELECT document FROM rollouts WHERE rollout=?", (name,)).fetchone()
        return documents.read_rollout(row[0]) if row else None

    def put_audit(self, e: AuditEntry) -> None:
        """Appends to the audit log; call it in a `transaction`."""
        self._db.execute(
            "INSERT INTO audit (at_ns, who, what, why, cohort, model, rollout) VALUES (?,?,?,?,?,?,?)",
            (e.at_ns, e.who, e.what, e.why, e.cohort, e.model, e.rollout),
        )

    # ── orders from outside ────────────────────────────────────────────────────────────────────────────

    def request(self, kind: str, document: Mapping[str, object], *, by: str, why: str, now_ns: int) -> int:
        """Leaves an order for the service and returns its number; any process may."""
        with transaction(self._db):
            done = self._db.execute(
                "INSERT INTO requests (kind, document, who, why, created_ns) VALUES (?,?,?,?,?)",
                (kind, json.dumps(document, sort_keys=True), by, why, now_ns),
            )
        assert done.lastrowid is not None
        return done.lastrowid

    def answer(self, number: int) -> tuple[str, str]:
        """(``pending``, ``accepted`` or ``refused``, the reason or the rollout's name); KeyError when unknown."""
        row = self._db.execute("SELECT state, answer FROM requests WHERE id=?", (number,)).fetchone()
        if row is None:
            raise KeyError(number)
        return str(row[0]), str(row[1])

    def pending(self) -> tuple[Request, ...]:
        """The orders nobody has handled yet, oldest first."""
        rows = self._db.execute(
            "SELECT id, kind, document, who, why, created_ns FROM requests WHERE state='pending'"
            " ORDER BY id LIMIT 100"
        )
        return tuple(
            Request(number=row[0], kind=row[1], document=row[2], by=row[3], why=row[4], created_ns=row[5])
            for row in rows
        )

    def put_answer(self, number: int, *, accepted: bool, reason: str) -> None:
        """Answers an order; call it in a `transaction`."""
        state = "accepted" if accepted else "refused"
        self._db.execute("UPDATE requests SET state=?, answer=? WHERE id=?", (state, reason, number))

    # ── drift ──────────────────────────────────────────────────────────────────────────────────────────

    def put_verdict(self, v: Verdict, *, look: bool) -> None:
        """Writes the standing verdict, what it does to its incident, and, for a ``look``, the history."""
        text = documents.to_text(v)
        key = (v.digest, v.cohort, v.kind)
        self._db.execute(
            "INSERT OR REPLACE INTO verdicts VALUES (?,?,?,?,?,?,?,?,?,?,?)",
            (*key, v.model, v.at_ns, v.outcome, v.reason, v.streak, v.clear, v.incident, text),
        )
        moved = v.judgement.moved
        if look:
            self._db.execute(
                "INSERT INTO looks (at_ns, model, digest, cohort, kind, outcome, judged, p, reason, moved)"
                " VALUES (?,?,?,?,?,?,?,?,?,?)",
                (
                    *(v.at_ns, v.model, *key, v.outcome, v.judgement.outcome, v.judgement.p, v.reason),
                    json.dumps(moved),
                ),
            )
        if v.changed == "opened":
            self._db.execute(
                "INSERT INTO incidents (model, digest, cohort, kind, opened_ns, updated_ns, columns, document)"
                " VALUES (?,?,?,?,?,?,?,?)",
                (v.model, *key, v.at_ns, v.at_ns, json.dumps(moved), text),
            )
        elif v.changed == "closed":
            self._close(key, v.at_ns, v.reason)
        elif v.incident and moved:
            self._grow(key, moved, v.at_ns, text)

    def _grow(self, key: tuple[str, str, str], moved: Sequence[str], at_ns: int, text: str) -> None:
        """The open incident takes in columns that moved since."""
        row = self._db.execute(
            "SELECT id, columns FROM incidents WHERE digest=? AND cohort=? AND kind=? AND closed_ns IS NULL",
            key,
        ).fetchone()
        if row is not None:
            columns = list(dict.fromkeys([*json.loads(row[1]), *moved]))
            self._db.execute(
                "UPDATE incidents SET columns=?, updated_ns=?, document=? WHERE id=?",
                (json.dumps(columns), at_ns, text, row[0]),
            )

    def _close(self, key: tuple[str, str, str], at_ns: int, why: str) -> None:
        self._db.execute(
            "UPDATE incidents SET closed_ns=?, closed_why=?"
            " WHERE digest=? AND cohort=? AND kind=? AND closed_ns IS NULL",
            (at_ns, why, *key),
        )

    def retire(self, trail: Trail, at_ns: int, why: str) -> None:
        """Ends an incident that no look will ever clear, and its verdict; call it in a `transaction`."""
        key = (trail.digest, trail.cohort, trail.kind)
        self._close(key, at_ns, why)
        self._db.execute("DELETE FROM verdicts WHERE digest=? AND cohort=? AND kind=?", key)

    def verdicts(self) -> tuple[Verdict, ...]:
        """Every standing verdict with its figures, newest look first, the fleet before its cohorts."""
        rows = self._db.execute(
            "SELECT document FROM verdicts ORDER BY at_ns DESC, cohort<>'fleet', cohort, kind"
        )
        return tuple(documents.read_verdict(row[0]) for row in rows)

    def trails(self) -> tuple[Trail, ...]:
        """What every standing verdict remembers."""
        rows = self._db.execute("SELECT model, digest, cohort, kind, streak, clear, incident FROM verdicts")
        return tuple(
            Trail(
                model=ModelName(row[0]),
                digest=Digest(row[1]),
                cohort=row[2],
                kind=row[3],
                streak=row[4],
                clear=row[5],
                incident=bool(row[6]),
            )
            for row in rows
        )

    def put_cursor(self, digest: Digest, device: DeviceId, last: int) -> None:
        """A look has used the device's windows up to ``last``; call it in a `transaction`."""
        self._db.execute("INSERT OR REPLACE INTO cursors VALUES (?,?,?)", (digest, device, last))

    def cursors(self) -> dict[tuple[Digest, DeviceId], int]:
        """The newest window that a look has used, by artifact and device."""
        rows = self._db.execute("SELECT digest, device, last FROM cursors")
        return {(Digest(a), DeviceId(d)): int(n) for a, d, n in rows}

    def put_origin(self, digest: Digest, device: DeviceId, profile: Profile) -> None:
        """Keeps what a device's first look at an artifact saw, once; call it in a `transaction`."""
        self._db.execute(
            "INSERT OR IGNORE INTO origins VALUES (?,?,?)", (digest, device, documents.profile_text(profile))
        )

    def origins(self, digest: Digest) -> dict[DeviceId, Profile]:
        """What each device's first look at an artifact saw."""
        rows = self._db.execute("SELECT device, document FROM origins WHERE digest=?", (digest,))
        return {DeviceId(device): documents.read_profile(text) for device, text in rows}

    def put_baseline(self, digest: Digest, units: Iterable[Unit], at_ns: int) -> None:
        """Keeps the artifact's baseline, once; call it in a `transaction`."""
        self._db.execute(
            "INSERT OR IGNORE INTO baselines VALUES (?,?,?)", (digest, at_ns, documents.units_text(units))
        )

    def baseline(self, digest: Digest) -> tuple[Unit, ...] | None:
        """The artifact's baseline, None before there is one."""
        row = self._db.execute("SELECT document FROM baselines WHERE digest=?", (digest,)).fetchone()
        return documents.read_units(row[0]) if row else None

    # ── retraining ─────────────────────────────────────────────────────────────────────────────────────

    def put_retrain(self, r: RetrainRequest, state: str) -> int:
        """Keeps a request, ``waiting`` for its hook or only ``recorded``; returns its number. Call it within `save`."""
        done = self._db.execute(
            "INSERT INTO retrains (model, digest, cohort, created_ns, why, document, state) VALUES (?,?,?,?,?,?,?)",
            (r.model, r.digest, r.cohort, r.at_ns, r.why, r.document, state),
        )
        assert done.lastrowid is not None
        return done.lastrowid

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
        with transaction(self._db):
            self._db.execute(
                "UPDATE retrains SET state=?, exit_code=?, output=?, ended_ns=? WHERE id=?",
                (state, exit_code, output, ended_ns, number),
            )

    def retrains(self, state: str) -> tuple[tuple[int, str], ...]:
        """(number, document) of the requests in ``state``, oldest first."""
        rows = self._db.execute("SELECT id, document FROM retrains WHERE state=? ORDER BY id", (state,))
        return tuple((int(number), str(document)) for number, document in rows)

    def asked(self, model: ModelName) -> tuple[frozenset[Digest], int | None]:
        """The artifacts of ``model`` that a request was made for, and when the newest was."""
        rows = self._db.execute("SELECT digest, created_ns FROM retrains WHERE model=?", (model,)).fetchall()
        return frozenset(Digest(d) for d, _ in rows), max((at for _, at in rows), default=None)

    # ── questions of people ────────────────────────────────────────────────────────────────────────────

    def table(self, name: str, limit: int = 100) -> tuple[dict[str, Any], ...]:
        """The newest rows of ``audit``, ``rollouts``, ``verdicts``, ``looks``, ``incidents``, ``retrains`` or
        ``requests``.

        Columns named ``document``, ``columns`` and ``moved`` are parsed from JSON.
        """
        answer = self._db.execute(QUERIES[name], (limit,))
        names = [column[0] for column in answer.description]
        return tuple(
            {
                k: json.loads(v) if k in ("document", "columns", "moved") else v
                for k, v in zip(names, row, strict=True)
            }
            for row in answer
        )
