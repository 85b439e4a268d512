"""Into the telemetry store: batches of windows, events and dead letters, each counted once."""

import hashlib
import json
from collections.abc import Sequence
from typing import Final

from aggregator.adapters.windows.intervals import EVENTS
from aggregator.adapters.windows.labels import KeptLabels
from aggregator.adapters.windows.schema import JUDGED, UNJUDGED
from aggregator.records import Arrival, DeadLetter, Stored
from edge_runtime.contract.codec import encode
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import Event, Labels, Window

MAX_LETTER_BYTES: Final = 16 * 1024
MAX_TOPIC_CHARACTERS: Final = 512

INSERT_WINDOW: Final = """
INSERT INTO windows (id, device, session, seq, seq_lo, model, digest, layout, state, start_ns, end_ns, synced,
  received_ns, rows, failed, refused, labelled, correct, rss_bytes, peak_rss_bytes, wire_bytes, latency, windows)
VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"""
INSERT_PAYLOAD: Final = "INSERT INTO payloads VALUES (?,?)"
INSERT_STREAM: Final = "INSERT INTO streams VALUES (?,?,?) ON CONFLICT DO UPDATE SET newest=excluded.newest"
NEWEST: Final = "SELECT COALESCE((SELECT seq FROM sqlite_sequence WHERE name='windows'), 0)"

# Of a JSON list of (device, session, number) the places for which something at the number or beyond it is stored.
NOT_BEYOND: Final = """
WITH asked AS MATERIALIZED (
  SELECT key AS i, json_extract(value,'$[0]') AS d, json_extract(value,'$[1]') AS s, json_extract(value,'$[2]') AS n
  FROM json_each(?))
SELECT i FROM asked WHERE EXISTS (SELECT 1 FROM windows WHERE device=d AND session=s AND seq>=n)
  OR EXISTS (SELECT 1 FROM intervals WHERE device=d AND session=s AND hi>=n)"""

# As JSON writes `codec.latency_body`, without its encoder, which took longer than the rest of a row.
LATENCY_TEXT: Final = '{"offset":%d,"counts":[%s],"zero":%d,"sum":%d,"max":%d}'

# The nearest record that may clash: of the same model, or with the same key.
NEAREST: Final = """
SELECT seq_lo, seq, model FROM windows
WHERE device=? AND session=? AND seq>=? AND (model=? OR seq=?) ORDER BY seq LIMIT 1"""
NEAREST_GONE: Final = """
SELECT lo, hi FROM intervals WHERE device=? AND session=? AND model=? AND hi>=? ORDER BY hi LIMIT 1"""


class Append(KeptLabels):
    """What the ingest needs."""

    _max_letters: int

    def append(
        self,
        windows: Sequence[Arrival],
        events: Sequence[Event],
        dead: Sequence[DeadLetter],
        received_ns: int,
        *,
        labels: Sequence[Labels] = (),
    ) -> Stored:
        """Commits a batch; durable on return.

        Raises:
            Unstorable: a number in it is beyond 63 bits; nothing is stored.
            StoreError: the disk fails; nothing is stored.
        """
        stored = duplicates = overlapping = 0
        with self._db.transaction():
            beyond = self._beyond([arrival.window for arrival in windows])
            new: list[Arrival] = []
            for arrival, is_beyond in zip(windows, beyond, strict=True):
                if is_beyond:
                    new.append(arrival)
                    continue
                stored += self._insert(new, received_ns)
                new.clear()
                clash = self._clash(arrival.window)
                if clash is None:
                    new.append(arrival)
                elif clash:
                    overlapping += 1
                    w = arrival.window
                    topic = f"{w.device}/{w.model}/window"
                    self._bury(DeadLetter(topic, arrival.payload, clash, "overlap"), received_ns)
                else:
                    duplicates += 1
            stored += self._insert(new, received_ns)
            known = sum(not self._insert_event(event, received_ns) for event in events)
            duplicates += known
            self._count("events", len(events) - known)
            new_labels, contradicting = self._put_labels(labels, received_ns) if labels else (0, [])
            duplicates += len(labels) - new_labels - len(contradicting)
            for told, why in contradicting:
                self._bury(DeadLetter(f"labels/{told.source}", encode(told), why, "labels"), received_ns)
            for letter in dead:
                self._bury(letter, received_ns)
            if dead or overlapping or contradicting:
                self._trim_letters()
            self._count("duplicates_rejected", duplicates)
            self._count("overlaps_rejected", overlapping)
        return Stored(
            stored=stored,
            duplicates=duplicates,
            overlapping=overlapping,
            labels=new_labels,
            contradictions=tuple(why for _, why in contradicting),
        )

    def _beyond(self, windows: Sequence[Window]) -> list[bool]:
        """For each whether it begins after all of its session that is stored or comes before it, as nearly all do: such
        a one cannot clash.
        """
        asked = json.dumps([(w.device, w.session, w.seq_lo) for w in windows])
        beyond = [True] * len(windows)
        for (i,) in self._db.rows(NOT_BEYOND, (asked,)) if windows else ():
            beyond[i] = False
        last: dict[tuple[str, str], int] = {}
        for i, w in enumerate(windows):
            before = last.get((w.device, w.session), -1)
            beyond[i] = beyond[i] and w.seq_lo > before
            last[w.device, w.session] = max(before, w.seq)
        return beyond

    def _clash(self, w: Window) -> str | None:
        """None when the window is new, empty when it was counted, else how it contradicts what was counted.

        The numbers of a session are shared by its models: a merged record of one may span numbers of another, but no
        two messages have the same.
        """
        row = self._db.one(NEAREST, (w.device, w.session, w.seq_lo, w.model, w.seq))
        if row is not None and row[0] <= w.seq:
            if row == (w.seq_lo, w.seq, w.model):
                return ""
            if row[2] != w.model:
                return f"window {w.seq} of {w.model!r}: the number is a window's of {row[2]!r}"
            return (
                f"windows {w.seq_lo} to {w.seq} overlap the stored {row[0]} to {row[1]}: counted once already"
            )
        row = self._db.one(NEAREST_GONE, (w.device, w.session, w.model, w.seq_lo))
        if row is None or row[0] > w.seq:
            return None
        if row[0] <= w.seq_lo and w.seq <= row[1]:
            return ""
        return f"windows {w.seq_lo} to {w.seq} overlap {row[0]} to {row[1]}, rolled up: counted once already"

    def _insert(self, new: Sequence[Arrival], received_ns: int) -> int:
        """Stores windows that clash with none, numbered onwards from the highest number ever; returns how many."""
        if not new:
            return 0
        first = int(self._db.one(NEWEST)[0]) + 1
        self._db.many(INSERT_WINDOW, [_row(i, one, received_ns) for i, one in enumerate(new, first)])
        self._db.many(INSERT_PAYLOAD, [(i, one.payload) for i, one in enumerate(new, first)])
        newest = {(one.window.digest, one.window.device): i for i, one in enumerate(new, first)}
        self._db.many(INSERT_STREAM, [(*key, i) for key, i in newest.items()])
        self._count("windows", sum(one.window.windows for one in new))
        self._count("rows", sum(one.window.profile.rows for one in new))
        self._now_judged(one.window for one in new if one.judged)
        return len(new)

    def _insert_event(self, e: Event, received_ns: int) -> bool:
        row = self._db.one(NEAREST_GONE, (e.device, e.session, EVENTS, e.seq))
        if row is not None and row[0] <= e.seq:
            return False
        detail = "\n".join(f"{key}={value}" for key, value in e.detail)
        done = self._db.execute(
            "INSERT OR IGNORE INTO events (device, session, seq, wall_ns, received_ns, name, detail)"
            " VALUES (?,?,?,?,?,?,?)",
            (e.device, e.session, e.seq, e.wall_ns, received_ns, e.name, detail),
        )
        return done.rowcount == 1

    def _bury(self, letter: DeadLetter, received_ns: int) -> None:
        topic = letter.topic[:MAX_TOPIC_CHARACTERS]
        name = hashlib.sha256(topic.encode() + b"\0" + letter.payload).hexdigest()
        self._db.execute(
            "INSERT INTO dead_letters (hash, topic, reason, payload, length, times, first_ns, last_ns)"
            " VALUES (?,?,?,?,?,1,?,?) ON CONFLICT (hash) DO UPDATE SET times=times+1, last_ns=excluded.last_ns",
            (
                *(name, topic, letter.reason[:1024], letter.payload[:MAX_LETTER_BYTES], len(letter.payload)),
                *(received_ns, received_ns),
            ),
        )
        self._count("dead_letters", 1)

    def _trim_letters(self) -> None:
        self._db.execute(
            "DELETE FROM dead_letters WHERE id <= (SELECT id FROM dead_letters ORDER BY id DESC LIMIT 1 OFFSET ?)",
            (self._max_letters,),
        )


def _row(number: int, arrival: Arrival, received_ns: int) -> tuple[object, ...]:
    """The values of `INSERT_WINDOW`."""
    w, health, profile = arrival.window, arrival.window.health, arrival.window.profile
    return (
        *(number, w.device, w.session, w.seq, w.seq_lo, w.model, w.digest, profile.layout),
        JUDGED if arrival.judged else UNJUDGED,
        *(w.start_ns, w.end_ns, w.synced, received_ns, profile.rows, w.failed),
        sum(n for _, n in w.refused) if w.refused else 0,
        *(w.labelled, w.correct, health.rss_bytes, health.peak_rss_bytes),
        len(arrival.payload),
        latency_text(w.latency),
        w.windows,
    )


def latency_text(h: LatencyHistogram) -> str:
    """A histogram as JSON text, which `codec.read_latency` reads."""
    return LATENCY_TEXT % (h.offset, ",".join(map(str, h.counts)), h.zero, h.sum_ns, h.max_ns)
