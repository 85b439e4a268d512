"""Old windows become roll-ups: one profile and one row of counts for each device, artifact and day.

What is counted stays counted: in one transaction windows go, their counts are added to roll-ups, and their numbers to
the intervals that a window which comes again is refused by. Both stay for ever.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

from aggregator.adapters import documents
from aggregator.adapters.windows.append import latency_text
from aggregator.adapters.windows.intervals import EVENTS, Interval, compact
from aggregator.adapters.windows.labels import LABELS, KeptLabels, of_device
from aggregator.adapters.windows.part import read_window
from aggregator.adapters.windows.schema import JUDGED, REJECTED
from aggregator.stores import NEWEST
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.profile import Profile

DAY_NS: Final = 86_400 * 10**9
PRUNE_RECORDS: Final = 250
SETTLE_WINDOWS: Final = 1000
TRIED_ROLLUPS: Final = 8

OLD: Final = """
SELECT id, device, session, seq_lo, seq, digest, model, layout, state, received_ns, windows, rows, failed, refused,
  labelled, correct, wire_bytes, rss_bytes, peak_rss_bytes, payload
FROM windows JOIN payloads USING (id) WHERE received_ns<? ORDER BY received_ns, id LIMIT ?"""

# Also in a store of many judged windows of the artifact the next is found at once.
WAITING: Final = """
SELECT id, payload FROM windows INDEXED BY windows_unjudged JOIN payloads USING (id)
WHERE digest=? AND state=0 LIMIT ?"""

ADDED: Final = (
    *("records", "windows", "rows", "failed", "refused", "labelled", "correct"),
    *("labelled_squares", "products", "correct_squares", "wire_bytes"),
)
KEY: Final = ("device", "digest", "model", "layout", "day", "state")
INSERT_ROLLUP: Final = f"""
INSERT INTO rollups ({", ".join(KEY)}, {", ".join(ADDED)}, rss_bytes, peak_rss_bytes, first_ns, last_ns, newest,
  profile, latency) VALUES ({", ".join("?" * (len(KEY) + len(ADDED) + 7))})"""  # noqa: S608
ADD_ROLLUP: Final = f"""
UPDATE rollups SET {", ".join(f"{name}={name}+?" for name in ADDED)},
  rss_bytes=CASE WHEN ?>newest THEN ? ELSE rss_bytes END, peak_rss_bytes=MAX(peak_rss_bytes, ?),
  first_ns=MIN(first_ns, ?), last_ns=MAX(last_ns, ?), newest=MAX(newest, ?), profile=?, latency=? WHERE id=?"""  # noqa: S608

Key = tuple[str, str, str, str, int, int]


@dataclass(slots=True)
class _Rollup:
    """What windows of one key come to. A rejected window's profile is not kept: it never answers."""

    sums: list[float]
    rss_bytes: int
    peak_rss_bytes: int
    first_ns: int
    last_ns: int
    newest: int
    profile: Profile | None
    latency: LatencyHistogram

    def add(self, other: "_Rollup") -> bool:
        """Takes ``other`` in; False, and nothing done, when profiles or latencies cannot be merged."""
        try:
            profile = _merged_profile(self.profile, other.profile)
            self.latency = _merged_latency(self.latency, other.latency)
        except ContractError:
            return False
        self.profile = profile
        self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        if other.newest > self.newest:
            self.rss_bytes, self.newest = other.rss_bytes, other.newest
        self.peak_rss_bytes = max(self.peak_rss_bytes, other.peak_rss_bytes)
        self.first_ns, self.last_ns = min(self.first_ns, other.first_ns), max(self.last_ns, other.last_ns)
        return True


class Retention(KeptLabels):
    """Making room, and judging late."""

    def prune(self, before_ns: int) -> int:
        """Rolls up windows and labels, and lets go of events, received before ``before_ns``: `PRUNE_RECORDS` of each.

        Returns how many records went; call it again until that is 0, in between other work.
        """
        with self._db.transaction():
            windows = self._db.rows(OLD, (before_ns, PRUNE_RECORDS))
            events = self._db.rows(
                "SELECT id, device, session, seq FROM events WHERE received_ns<? ORDER BY received_ns LIMIT ?",
                (before_ns, PRUNE_RECORDS),
            )
            for key, rollup in _rolled_up(windows):
                self._put_rollup(key, rollup)
            gone: dict[tuple[str, str], list[Interval]] = {}
            for _, device, session, lo, hi, _, model, *_ in windows:
                found = gone.setdefault((device, session), [])
                found.append(Interval(model, lo, hi, whole=lo == hi))
            for _, device, session, seq in events:
                gone.setdefault((device, session), []).append(Interval(EVENTS, seq, seq, whole=True))
            labels, numbers = self._roll_up_labels(before_ns, PRUNE_RECORDS)
            for key_of, told in numbers.items():
                gone.setdefault(key_of, []).extend(told)
            for (device, session), intervals in gone.items():
                self._put_intervals(device, session, intervals)
            for table, rows in (("payloads", windows), ("windows", windows), ("events", events)):
                self._db.many(f"DELETE FROM {table} WHERE id=?", [row[:1] for row in rows])  # noqa: S608
            self._count("events", -len(events))
        return len(windows) + len(events) + labels

    def _put_intervals(self, device: str, session: str, new: Iterable[Interval]) -> None:
        new = tuple(new)
        mine = "device=? AND session=?"
        key: tuple[str | int, ...] = (device, session)
        if all(i.model == LABELS for i in new):
            # A source's numbers lie apart, each an interval of its own: what is far from the new ones stays as it is.
            # Intervals of one source do not overlap: those beyond the first that reaches past the new ones lie apart.
            first, last = min(i.lo for i in new) - 1, min(max(i.hi for i in new) + 1, NEWEST)
            mine += (
                " AND model=? AND hi>=? AND lo<=? AND hi<=COALESCE((SELECT MIN(hi) FROM intervals"
                " WHERE device=? AND session=? AND model=? AND hi>=?), ?)"
            )
            key += (LABELS, first, last, *key, LABELS, last, last)
        kept = self._db.rows(f"SELECT model, lo, hi, whole FROM intervals WHERE {mine}", key)  # noqa: S608
        intervals = compact([*(Interval(m, lo, hi, bool(whole)) for m, lo, hi, whole in kept), *new])
        self._db.execute(f"DELETE FROM intervals WHERE {mine}", key)  # noqa: S608
        self._db.many(
            "INSERT INTO intervals VALUES (?,?,?,?,?,?)",
            [(device, session, i.model, i.lo, i.hi, int(i.whole)) for i in intervals],
        )

    def _put_rollup(self, key: Key, new: _Rollup) -> None:
        """Adds to a roll-up that is there, or makes one; those of one key differ in what cannot be merged.

        Only the newest few are tried: a device that lies may make one of each window.
        """
        rows = self._db.rows(
            "SELECT id, profile, latency FROM rollups"
            " WHERE device=? AND digest=? AND model=? AND layout=? AND day=? AND state=? ORDER BY id DESC LIMIT ?",
            (*key, TRIED_ROLLUPS),
        )
        ends = (new.rss_bytes, new.peak_rss_bytes, new.first_ns, new.last_ns, new.newest)
        for number, profile, latency in rows:
            try:
                merged = _merged_profile(read_profile(profile), new.profile)
                whole = _merged_latency(read_latencies(latency), new.latency)
            except ContractError:
                continue
            added = (*new.sums, new.newest, *ends, _profile_text(merged), latency_text(whole))
            self._db.execute(ADD_ROLLUP, (*added, number))
            return
        texts = (_profile_text(new.profile), latency_text(new.latency))
        self._db.execute(INSERT_ROLLUP, (*key, *new.sums, *ends, *texts))

    def settle(self, digest: Digest, check: Callable[[Profile], object]) -> tuple[int, int]:
        """The artifact became known: judges up to `SETTLE_WINDOWS` windows kept unjudged; (accepted, rejected).

        Call it until both are 0. ``check`` raises `ContractError` on a profile that contradicts the artifact;
        that window stays stored, with the reason, and is left out of every answer. What was rolled up meanwhile is
        judged a day of a device at a time.
        """
        rejected = 0
        with self._db.transaction():
            windows = self._db.rows(
                WAITING,
                (digest, SETTLE_WINDOWS),
            )
            taken = []
            for number, payload in windows:
                window = read_window(payload)
                try:
                    check(window.profile)
                except ContractError as e:
                    self._db.execute(
                        "UPDATE windows SET state=?, reason=? WHERE id=?", (REJECTED, str(e), number)
                    )
                    rejected += 1
                else:
                    self._db.execute("UPDATE windows SET state=? WHERE id=?", (JUDGED, number))
                    taken.append(window)
            self._now_judged(taken)
            accepted = len(taken)
            rollups = self._db.rows(
                "SELECT id, profile, records, device, model, labelled, correct FROM rollups"
                " WHERE digest=? AND state=0 LIMIT ?",
                (digest, SETTLE_WINDOWS),
            )
            for number, text, records, device, model, labelled, correct in rollups:
                profile = documents.read_profile(text)
                try:
                    check(profile)
                except ContractError:
                    self._db.execute("UPDATE rollups SET state=?, profile='' WHERE id=?", (REJECTED, number))
                    rejected += records
                else:
                    self._db.execute("UPDATE rollups SET state=? WHERE id=?", (JUDGED, number))
                    accepted += records
                    if labelled:
                        self._add_truth([of_device((digest, device), model, labelled, correct, profile)])
        return accepted, rejected


def _rolled_up(rows: Sequence[Any]) -> list[tuple[Key, _Rollup]]:
    """The rows of `OLD`, added up by key."""
    found: dict[Key, list[_Rollup]] = {}
    for row in sorted(rows, key=itemgetter(0)):
        number, device, _, _, _, digest, model, layout, state, received_ns, *rest = row
        *counts, wire_bytes, rss_bytes, peak_rss_bytes, payload = rest
        labelled, correct = counts[-2:]
        squares = (float(labelled) ** 2, float(labelled) * correct, float(correct) ** 2)
        window = read_window(payload)
        new = _Rollup(
            sums=[1, *counts, *squares, wire_bytes],
            rss_bytes=rss_bytes,
            peak_rss_bytes=peak_rss_bytes,
            first_ns=received_ns,
            last_ns=received_ns,
            newest=number,
            profile=None if state == REJECTED else window.profile,
            latency=LatencyHistogram() if state == REJECTED else window.latency,
        )
        parts = found.setdefault((device, digest, model, layout, received_ns // DAY_NS, state), [])
        if not any(part.add(new) for part in parts):
            parts.append(new)
    return [(key, part) for key, parts in found.items() for part in parts]


def _merged_profile(a: Profile | None, b: Profile | None) -> Profile | None:
    """Both, or the first when one is of a rejected window; raises `ContractError` when they cannot be merged."""
    return a if a is None or b is None else a.merge(b)


def _merged_latency(a: LatencyHistogram, b: LatencyHistogram) -> LatencyHistogram:
    """Both; raises `ContractError` when a number of them would be beyond those that a store counts with."""
    merged = a.merge(b)
    if max(merged.sum_ns, merged.zero, *merged.counts, 0) > NEWEST:
        raise ContractError(f"latencies that sum to more than {NEWEST} ns cannot be merged")
    return merged


def read_latencies(text: str) -> LatencyHistogram:
    """The histogram that `latency_text` wrote, however large its numbers: merging was not bounded always."""
    found = json.loads(text)
    return LatencyHistogram(
        offset=found["offset"],
        counts=tuple(found["counts"]),
        zero=found["zero"],
        sum_ns=found["sum"],
        max_ns=found["max"],
    )


def read_profile(text: str) -> Profile | None:
    """A roll-up's profile; None for a rejected one."""
    return documents.read_profile(text) if text else None


def _profile_text(profile: Profile | None) -> str:
    return "" if profile is None else documents.profile_text(profile)
