"""Questions to the telemetry store."""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from aggregator.adapters import documents
from aggregator.adapters.windows.part import Part, read_window
from aggregator.adapters.windows.retention import DAY_NS, read_latencies
from aggregator.adapters.windows.schema import JUDGED, REJECTED
from aggregator.looks import Block, Reading, merge
from aggregator.records import DeviceTotals, Receipt, Selection, StoreFigures
from aggregator.stores import NEWEST, CutDay
from edge_runtime.contract.ids import DeviceId, Digest
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import Window
from edge_runtime.contract.profile import Profile

COUNTED = (
    "device, digest, windows, rows, failed, refused, labelled, correct, wire_bytes, rss_bytes, peak_rss_bytes"
)
OF_WINDOWS = (
    f"{COUNTED}, received_ns AS first_ns, received_ns AS last_ns, id AS newest, CAST(labelled AS REAL)*labelled AS nn,"
    " CAST(labelled AS REAL)*correct AS cn, CAST(correct AS REAL)*correct AS cc"
)
OF_ROLLUPS = (
    f"{COUNTED}, first_ns, last_ns, newest, labelled_squares AS nn, products AS cn, correct_squares AS cc"
)
# Of a JSON list of (device, number), device by device: it is they that the index is asked for.
PENDING = """
WITH asked AS MATERIALIZED (
  SELECT json_extract(value,'$[0]') AS d, json_extract(value,'$[1]') AS n FROM json_each(?))
SELECT device, SUM(rows+refused), SUM(MAX(0, end_ns-start_ns)/1e9), MIN(received_ns)
FROM asked CROSS JOIN windows ON digest=? AND device=d AND id>n AND state=? GROUP BY device"""
SUMS = """
SELECT device, digest, SUM(windows), SUM(rows), SUM(failed), SUM(refused), SUM(labelled), SUM(correct),
  SUM(wire_bytes), MAX(peak_rss_bytes), MIN(first_ns), MAX(last_ns), SUM(nn), SUM(cn), SUM(cc), MAX(newest) AS top"""
# What a device holds is told by its newest record, wherever that is kept by now.
RSS = """
COALESCE((SELECT rss_bytes FROM windows WHERE id=top), (SELECT rss_bytes FROM rollups WHERE newest=top))"""
# Numbers rise as windows come, but for a clock that was set back, or processes that share the store: so it is the least
# number of all that was received since. The index alone tells it; unless it is named, SQLite reads the table from its
# first window on.
FIRST_SINCE = "(SELECT MIN(id) FROM windows INDEXED BY windows_by_receipt WHERE received_ns>=:since)"

Condition = tuple[str, dict[str, object]]


class Answers(Part):
    """What the monitor, the gates and people ask."""

    def unjudged(self) -> tuple[Digest, ...]:
        """Artifacts with windows that wait for their layout."""
        rows = self._db.rows(
            "SELECT digest FROM windows WHERE state=0 UNION SELECT digest FROM rollups WHERE state=0 ORDER BY digest"
        )
        return tuple(Digest(row[0]) for row in rows)

    def streams(self) -> tuple[tuple[Digest, DeviceId, int], ...]:
        """Every (artifact, device) that ever sent a window, with the number of its newest."""
        rows = self._db.rows("SELECT digest, device, newest FROM streams ORDER BY digest, device")
        return tuple((Digest(a), DeviceId(d), int(n)) for a, d, n in rows)

    def pending(
        self, digest: Digest, after: Mapping[DeviceId, int]
    ) -> dict[DeviceId, tuple[int, float, int]]:
        """(rows, seconds, received_ns of the oldest) of each device's judged windows numbered above ``after``.

        Rows are those answered and those refused: a device all of whose rows are refused has something to tell, too.
        """
        asked = json.dumps(list(after.items()))
        rows = self._db.rows(PENDING, (asked, digest, JUDGED))
        return {DeviceId(device): (int(n), float(seconds), int(at)) for device, n, seconds, at in rows}

    def block(
        self,
        digest: Digest,
        device: DeviceId,
        after: int,
        *,
        rows: int,
        seconds: float,
        upto: int = NEWEST,
    ) -> Block | None:
        """The newest windows numbered above ``after``, as many as it takes to cover ``rows`` and ``seconds``, merged.

        None when all of them together do not cover that.
        """
        found: Reading | None = None
        first = last = 0
        span = 0.0
        answer = self._db.each(
            "SELECT id, payload FROM windows JOIN payloads USING (id)"
            " WHERE digest=? AND device=? AND id>? AND id<=? AND state=? ORDER BY id DESC",
            (digest, device, after, upto, JUDGED),
        )
        for number, payload in answer:
            window = read_window(payload)
            new = _reading(window)
            found = new if found is None else merge([found, new])
            first, last = number, last or number
            span += max(0, window.end_ns - window.start_ns) / 1e9
            if found.profile.rows + sum(n for _, n in found.refused) >= rows and span >= seconds:
                return Block(reading=found, seconds=span, first=first, last=last)
        return None

    def numbered(self) -> tuple[int, int]:
        """The highest number that any window, and any message of labels, was ever kept under; 0 before the first."""
        highest = dict(self._db.rows("SELECT name, seq FROM sqlite_sequence"))
        return int(highest.get("windows", 0)), int(highest.get("labels", 0))

    def receipts(self, digest: Digest) -> tuple[Receipt, ...]:
        """The artifact's judged windows that are kept one by one, by their numbers."""
        rows = self._db.rows(
            "SELECT id, received_ns, device, rows+refused, MAX(0, end_ns-start_ns)/1e9 FROM windows"
            " WHERE digest=? AND state=? ORDER BY id",
            (digest, JUDGED),
        )
        return tuple(
            Receipt(number=number, received_ns=at, device=DeviceId(device), rows=n, seconds=seconds)
            for number, at, device, n, seconds in rows
        )

    def windows(self, selection: Selection) -> Iterator[Window]:
        """The selected windows themselves, oldest first; those that were rolled up are gone."""
        where, values = _windows_where(selection)
        query = f"SELECT payload FROM windows JOIN payloads USING (id) WHERE {where} ORDER BY id"  # noqa: S608
        for (payload,) in self._db.each(query, values):
            yield read_window(payload)

    def profiles(self, selection: Selection) -> tuple[Profile, ...]:
        """The merged profile per layout of what is selected: profiles of different layouts cannot be merged.

        A day's roll-up is selected when all of it was received between ``since_ns`` and ``until_ns``, and a day that
        they cut raises `CutDay`; ``last`` and ``after`` are about windows that are kept one by one. That holds for
        `latency` and `totals` too.
        """
        self._refuse_cut_days(selection)
        merged: dict[tuple[str, int, int], Profile] = {}
        for profile in self._profiles(selection):
            key = (profile.layout, profile.counts.size, profile.sums.size)
            merged[key] = merged[key].merge(profile) if key in merged else profile
        return tuple(merged[key] for key in sorted(merged))

    def _profiles(self, selection: Selection) -> Iterator[Profile]:
        where, values = _rollups_where(selection)
        for (text,) in self._db.each(f"SELECT profile FROM rollups WHERE {where}", values):  # noqa: S608
            yield documents.read_profile(text)
        for window in self.windows(selection):
            yield window.profile

    def latency(self, selection: Selection) -> LatencyHistogram:
        """All latencies of what is selected."""
        self._refuse_cut_days(selection)
        total = LatencyHistogram()
        for table, (where, values) in _both(selection):
            for (text,) in self._db.each(f"SELECT latency FROM {table} WHERE {where}", values):  # noqa: S608
                total = total.merge(read_latencies(text))
        return total

    def totals(self, selection: Selection) -> tuple[DeviceTotals, ...]:
        """The counts of what is selected, per device and artifact."""
        self._refuse_cut_days(selection)
        (_, (windows, values)), (_, (rollups, more)) = _both(selection)
        rows = self._db.rows(
            f"SELECT *, {RSS} FROM ({SUMS} FROM (SELECT {OF_WINDOWS} FROM windows WHERE {windows}"  # noqa: S608
            f" UNION ALL SELECT {OF_ROLLUPS} FROM rollups WHERE {rollups}) GROUP BY device, digest)"
            " ORDER BY device, digest",
            values | more,
        )
        return tuple(
            DeviceTotals(
                device=DeviceId(row[0]),
                digest=Digest(row[1]),
                windows=row[2],
                rows=row[3],
                failed=row[4],
                refused=row[5],
                labelled=row[6],
                correct=row[7],
                wire_bytes=row[8],
                rss_bytes=row[16],
                peak_rss_bytes=row[9],
                first_ns=row[10],
                last_ns=row[11],
                labelled_squares=row[12],
                products=row[13],
                correct_squares=row[14],
            )
            for row in rows
        )

    def _refuse_cut_days(self, s: Selection) -> None:
        if s.leave_out_cut_days or _one_by_one(s) or (s.since_ns, s.until_ns) == (0, NEWEST):
            return
        where, values = _matching(s)
        row = self._db.one(
            f"SELECT device, first_ns, last_ns FROM rollups WHERE {where}"  # noqa: S608
            " AND day>=:day AND last_ns>=:since AND first_ns<:until"
            " AND NOT (first_ns>=:since AND last_ns<:until) ORDER BY first_ns LIMIT 1",
            {**values, "since": s.since_ns, "until": s.until_ns, "day": s.since_ns // DAY_NS},
        )
        if row is not None:
            device, first_ns, last_ns = row
            raise CutDay(
                f"windows of {device} that were received from {_moment(first_ns)} to {_moment(last_ns)} are rolled up "
                f"into one, and the question begins or ends between them: ask from {first_ns} or {last_ns + 1} ns, "
                f"to {first_ns} or {last_ns + 1} ns, or for an answer without that day (leave_out_cut_days)"
            )

    def wire_bytes(self, selection: Selection, quantile: float = 0.5) -> int:
        """A quantile of the selected windows' size on the wire in bytes; 0 when there are none."""
        where, values = _windows_where(selection)
        n = self._db.one(f"SELECT COUNT(*) FROM windows WHERE {where}", values)[0]  # noqa: S608
        row = self._db.one(
            f"SELECT wire_bytes FROM windows WHERE {where} ORDER BY wire_bytes LIMIT 1 OFFSET :offset",  # noqa: S608
            {**values, "offset": min(max(n - 1, 0), int(quantile * n))},
        )
        return int(row[0]) if row else 0

    def figures(self) -> StoreFigures:
        """The store's own totals."""
        counters = dict(self._db.rows("SELECT name, value FROM counters"))
        return StoreFigures(
            windows=counters.get("windows", 0),
            rows=counters.get("rows", 0),
            unjudged=self._records_in(0),
            rejected=self._records_in(2),
            duplicates_rejected=counters.get("duplicates_rejected", 0),
            overlaps_rejected=counters.get("overlaps_rejected", 0),
            events=counters.get("events", 0),
            dead_letters=self._count_of("dead_letters"),
            dead_letters_ever=counters.get("dead_letters", 0),
        )

    def dead_letters(self, limit: int = 100) -> tuple[dict[str, Any], ...]:
        """The newest dead letters: topic, reason, times, length, last_ns and the kept part of the payload."""
        return self._dicts(
            "SELECT topic, reason, times, length, first_ns, last_ns, payload FROM dead_letters"
            " ORDER BY last_ns DESC, id DESC"
            " LIMIT ?",
            limit,
        )

    def events(self, limit: int = 100) -> tuple[dict[str, Any], ...]:
        """The newest events of all devices."""
        return self._dicts(
            "SELECT device, session, seq, wall_ns, received_ns, name, detail FROM events ORDER BY id DESC LIMIT ?",
            limit,
        )

    def _records_in(self, state: int) -> int:
        # The state stands in the text, for partial indexes are found by it.
        rolled_up = self._db.one(f"SELECT COALESCE(SUM(records), 0) FROM rollups WHERE state={state}")[0]  # noqa: S608
        return self._count_of(f"windows WHERE state={state}") + int(rolled_up)

    def _count_of(self, what: str) -> int:
        return int(self._db.one(f"SELECT COUNT(*) FROM {what}")[0])  # noqa: S608

    def _dicts(self, query: str, limit: int) -> tuple[dict[str, Any], ...]:
        with self._db.translated():
            answer = self._db.execute(query, (limit,))
            names = [column[0] for column in answer.description]
            return tuple(dict(zip(names, row, strict=True)) for row in answer)


def _reading(w: Window) -> Reading:
    return Reading(
        device=w.device,
        profile=w.profile,
        start_ns=w.start_ns,
        end_ns=w.end_ns,
        windows=w.windows,
        labelled=w.labelled,
        correct=w.correct,
        refused=tuple(sorted(w.refused)),
    )


def _both(s: Selection) -> tuple[tuple[str, Condition], tuple[str, Condition]]:
    """Both tables with their conditions."""
    return ("windows", _windows_where(s)), ("rollups", _rollups_where(s))


def _one_by_one(s: Selection) -> bool:
    """Whether the selection is by windows' numbers, which a roll-up has none of."""
    return bool(s.last or s.after)


def _windows_where(s: Selection) -> Condition:
    """The condition of a selection with named values; rejected windows never answer.

    Bounds that say nothing are left out, for SQLite chooses an index by them. What was received since some time is
    looked for from that time's first number on, and the newest from the end downwards until there are enough: neither
    reads what is older.
    """
    where, values = _matching(s)
    if s.since_ns > 0:
        where += f" AND received_ns>=:since AND id>={FIRST_SINCE}"
        values["since"] = s.since_ns
    if s.until_ns < NEWEST:
        where += " AND received_ns<:until"
        values["until"] = s.until_ns
    if s.after:
        where += " AND id>:after"
        values["after"] = s.after
    if s.last:
        where = f"id IN (SELECT id FROM windows NOT INDEXED WHERE {where} ORDER BY id DESC LIMIT :last)"  # noqa: S608
        values["last"] = s.last
    return where, values


def _rollups_where(s: Selection) -> Condition:
    """The same for roll-ups, each of which is of one ``day`` of receipt."""
    if _one_by_one(s):
        return "0", {}
    where, values = _matching(s)
    if s.since_ns > 0:
        where += " AND day>=:day AND first_ns>=:since"
        values |= {"day": s.since_ns // DAY_NS, "since": s.since_ns}
    if s.until_ns < NEWEST:
        where += " AND last_ns<:until"
        values["until"] = s.until_ns
    return where, values


def _matching(s: Selection) -> Condition:
    """The condition but for numbers and times."""
    values: dict[str, object] = {"rejected": REJECTED}
    parts = ["state<>:rejected"]
    for name in ("model", "digest", "layout"):
        value = getattr(s, name)
        if value is not None:
            parts.append(f"{name}=:{name}")
            values[name] = value
    if s.devices is not None:
        parts.append("device IN (SELECT value FROM json_each(:devices))")
        values["devices"] = json.dumps(s.devices)
    return " AND ".join(parts), values


def _moment(at_ns: int) -> str:
    return datetime.fromtimestamp(at_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
