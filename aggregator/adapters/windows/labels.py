"""Labels in the telemetry store: each counted once for ever, beside the estimate of the windows they are about.

A row of labels carries what the judged windows that its period reaches say of themselves: their rows, and the sum of
their largest probabilities. It is added whichever comes first, in the transaction of what comes second, so that no
question has to read windows. Windows of a clock that could not be trusted are in no period.

What is known by device and artifact stands in ``truth``: what devices told with their windows (``late`` 0), and all
labels that came (``late`` 1), added by triggers. Of ``labelled`` rows ``compared`` have an estimate beside them, which
expected ``expected`` right answers where ``compared_correct`` were.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any, Final

from aggregator.adapters.windows.intervals import Interval
from aggregator.adapters.windows.part import Part, read_window
from aggregator.adapters.windows.schema import JUDGED
from aggregator.records import DeviceTruth, LateLabels
from aggregator.stores import NEWEST
from edge_runtime.contract.ids import DeviceId, Digest, ModelName, SourceId
from edge_runtime.contract.messages import Labels, Window
from edge_runtime.contract.profile import FIXED_POINT, Profile

LABELS: Final = "labels"
"""Stands where a model's name would in `intervals`, and a space before the source where a session would."""

MOST_PERIODS: Final = 8
"""So many lengths of periods are kept of a source: one that tells of spans as they come has no end of them."""

KNOWN: Final = """
SELECT model, digest, start_ns, end_ns, labelled, correct FROM labels WHERE device=? AND source=? AND seq=?"""
INSERT: Final = """
INSERT INTO labels (device, source, seq, model, digest, start_ns, end_ns, labelled, correct, received_ns, rows, top)
VALUES (?,?,?,?,?,?,?,?,?,?,?,?)"""
REACHED: Final = """
SELECT payload FROM windows JOIN payloads USING (id)
WHERE digest=? AND device=? AND state=? AND synced=1 AND start_ns<? AND MAX(end_ns, start_ns+1)>?"""
REACHING: Final = """
UPDATE labels SET rows=rows+?, top=top+?
WHERE digest=? AND device=? AND end_ns>=? AND start_ns<? AND MAX(end_ns, start_ns+1)>?"""
ADD_PERIOD: Final = f"""
INSERT OR IGNORE INTO periods SELECT :source, :length_ns
WHERE (SELECT COUNT(*) FROM periods WHERE source=:source)<{MOST_PERIODS}"""  # noqa: S608
# Without the index's name SQLite would read all labels of the device, in the order of their sources.
TWINS: Final = """
SELECT DISTINCT source FROM labels INDEXED BY labels_by_end WHERE digest=? AND device=? AND end_ns=? AND start_ns=?
AND labelled=? AND correct=? AND source<>?"""
# Who told any is known without a look at each of them.
NEWEST_OF_EACH: Final = """
SELECT device, (SELECT MAX(id) FROM labels WHERE digest=truth.digest AND device=truth.device) AS newest
FROM truth WHERE digest=? AND late=1 AND newest IS NOT NULL ORDER BY device"""
ADD_TRUTH: Final = """
INSERT INTO truth (digest, device, late, model, labelled, correct, compared, compared_correct, expected)
VALUES (?,?,?,?,?,?,?,?,?) ON CONFLICT (digest, device, late) DO UPDATE SET
  labelled=labelled+excluded.labelled, correct=correct+excluded.correct, compared=compared+excluded.compared,
  compared_correct=compared_correct+excluded.compared_correct, expected=expected+excluded.expected"""

Stream = tuple[Digest, DeviceId]


class KeptLabels(Part):
    """Labels in, and what they come to."""

    def _put_labels(self, told: Sequence[Labels], received_ns: int) -> tuple[int, list[tuple[Labels, str]]]:
        """Stores what is new; how many that were, and those that contradict what their source told before."""
        new: dict[Stream, list[Labels]] = {}
        seen: dict[tuple[str, str, int], tuple[object, ...]] = {}
        wrong: list[tuple[Labels, str]] = []
        for one in told:
            key, says = (one.device, one.source, one.seq), _says(one)
            before = seen.get(key) or self._db.one(KNOWN, key)
            if before is None and not self._is_gone(*key):
                seen[key] = says
                new.setdefault((one.digest, one.device), []).append(one)
            elif before is not None and tuple(before) != says:
                wrong.append((one, _contradiction(one, before)))
        for stream, labels in new.items():
            sums = self._estimates(stream, labels)
            self._db.many(INSERT, [_row(one, received_ns, *s) for one, s in zip(labels, sums, strict=True)])
        lengths = {(one.source, one.end_ns - one.start_ns) for labels in new.values() for one in labels}
        self._db.many(ADD_PERIOD, [{"source": name, "length_ns": n} for name, n in sorted(lengths)])
        return sum(map(len, new.values())), wrong

    def _is_gone(self, device: str, source: str, seq: int) -> bool:
        """Whether the labels were rolled up."""
        row = self._db.one(
            "SELECT lo FROM intervals WHERE device=? AND session=? AND model=? AND hi>=? ORDER BY hi LIMIT 1",
            (device, f" {source}", LABELS, seq),
        )
        return row is not None and row[0] <= seq

    def _estimates(self, stream: Stream, labels: Sequence[Labels]) -> list[tuple[int, int]]:
        """(rows, sum of the largest probabilities) of the stored windows that each period reaches, of one stream."""
        first, last = min(one.start_ns for one in labels), max(map(_end, labels))
        found = [
            (w.start_ns, _end(w), w.profile.rows, int(w.profile.sums[0]))
            for (payload,) in self._db.each(REACHED, (*stream, JUDGED, last, first))
            if _estimates((w := read_window(payload)).profile)
        ]
        if not found:
            return [(0, 0)] * len(labels)
        # What a period reaches is what begins before its end, without what has ended by its beginning.
        begun, ended = (_cumulated(found, column) for column in (0, 1))
        starts, ends = (sorted(row[column] for row in found) for column in (0, 1))
        sums = []
        for one in labels:
            rows, top = begun[bisect_left(starts, _end(one))]
            rows_before, top_before = ended[bisect_right(ends, one.start_ns)]
            sums.append((min(rows - rows_before, NEWEST), min(top - top_before, NEWEST)))
        return sums

    def _now_judged(self, windows: Iterable[Window]) -> None:
        """Windows became part of what answers: their own labels count, and labels that reach them have an estimate."""
        windows = tuple(windows)
        self._add_truth(
            [
                of_device((w.digest, w.device), w.model, w.labelled, w.correct, w.profile)
                for w in windows
                if w.labelled
            ]
        )
        if self._db.one("SELECT 1 FROM labels LIMIT 1") is None:
            return
        self._db.many(
            REACHING,
            [
                (w.profile.rows, int(w.profile.sums[0]), w.digest, w.device, w.start_ns, _end(w), w.start_ns)
                for w in windows
                if w.synced and _estimates(w.profile)
            ],
        )

    def _add_truth(self, rows: Sequence[tuple[object, ...]]) -> None:
        if rows:
            self._db.many(ADD_TRUTH, rows)

    def _roll_up_labels(self, before_ns: int, most: int) -> tuple[int, dict[tuple[str, str], list[Interval]]]:
        """Lets go of old rows, which ``truth`` has; how many, and their numbers' intervals by device and source."""
        rows = self._db.rows(
            "SELECT id, device, source, seq FROM labels WHERE received_ns<? ORDER BY received_ns, id LIMIT ?",
            (before_ns, most),
        )
        gone: dict[tuple[str, str], list[Interval]] = {}
        for _, device, source, seq in rows:
            gone.setdefault((device, f" {source}"), []).append(Interval(LABELS, seq, seq, whole=True))
        self._db.many("DELETE FROM labels WHERE id=?", [row[:1] for row in rows])
        return len(rows), gone

    # ── questions ──────────────────────────────────────────────────────────────────────────────────────

    def truths(self, digest: Digest | None = None) -> tuple[DeviceTruth, ...]:
        """What is known of the right answers, by device and artifact, of all time."""
        where = "" if digest is None else "WHERE digest=?"
        rows = self._db.rows(
            "SELECT device, digest, model, SUM(labelled), SUM(correct), SUM(compared), SUM(compared_correct),"  # noqa: S608
            f" SUM(expected) FROM truth {where} GROUP BY digest, device ORDER BY digest, device",
            () if digest is None else (digest,),
        )
        return tuple(
            DeviceTruth(
                device=DeviceId(device),
                digest=Digest(of),
                model=ModelName(model),
                labelled=labelled,
                correct=correct,
                compared=compared,
                compared_correct=compared_correct,
                expected=expected,
            )
            for device, of, model, labelled, correct, compared, compared_correct, expected in rows
        )

    def late(self, digest: Digest, after: Mapping[DeviceId, int]) -> tuple[LateLabels, ...]:
        """The labels of an artifact that are kept one by one, of each device those numbered above ``after``."""
        newest = self._db.rows(NEWEST_OF_EACH, (digest,))
        return tuple(
            LateLabels(
                number=number,
                device=DeviceId(device),
                start_ns=start_ns,
                end_ns=end_ns,
                labelled=labelled,
                correct=correct,
            )
            for device, last in newest
            if last > after.get(DeviceId(device), 0)
            for number, start_ns, end_ns, labelled, correct in self._db.rows(
                "SELECT id, start_ns, end_ns, labelled, correct FROM labels"
                " WHERE digest=? AND device=? AND id>? ORDER BY id",
                (digest, device, after.get(DeviceId(device), 0)),
            )
        )

    def periods(self, source: SourceId) -> tuple[int, ...]:
        """The different lengths of the periods that a source ever told of, in nanoseconds, at most `MOST_PERIODS`.

        Those of labels that were rolled up before version 5 of the store are not known.
        """
        rows = self._db.rows("SELECT length_ns FROM periods WHERE source=? ORDER BY length_ns", (source,))
        return tuple(int(row[0]) for row in rows)

    def twins(self, told: Sequence[Labels]) -> dict[str, int]:
        """How many of these another source told, with the same device, artifact, period and counts, by its name.

        Of the labels that are kept one by one: of those that were rolled up, nobody can tell.
        """
        found: dict[str, int] = {}
        for one in told:
            rows = self._db.rows(
                TWINS,
                (one.digest, one.device, one.end_ns, one.start_ns, one.labelled, one.correct, one.source),
            )
            for (source,) in rows:
                found[source] = found.get(source, 0) + 1
        return found


def _says(one: Labels) -> tuple[object, ...]:
    return one.model, one.digest, one.start_ns, one.end_ns, one.labelled, one.correct


def _contradiction(one: Labels, before: Sequence[Any]) -> str:
    return (
        f"labels {one.seq} of source {one.source!r} about {one.device}: {one.correct} of {one.labelled} rows right "
        f"from {one.start_ns} to {one.end_ns}, where it told before: {before[5]} of {before[4]} from {before[2]} to "
        f"{before[3]}; what was counted stays, and other rows need another number"
    )


def _row(one: Labels, received_ns: int, rows: int, top: int) -> tuple[object, ...]:
    return (
        *(one.device, one.source, one.seq, one.model, one.digest, one.start_ns, one.end_ns),
        *(one.labelled, one.correct, received_ns, rows, top),
    )


def _end(what: Labels | Window) -> int:
    """The first moment after, of those that the store can count; one that takes no time takes a nanosecond."""
    return min(max(what.end_ns, what.start_ns + 1), NEWEST)


def _estimates(profile: Profile) -> bool:
    """Whether it says how many right answers it expects."""
    return bool(profile.rows and profile.sums.size)


def _cumulated(found: Sequence[tuple[int, int, int, int]], column: int) -> list[tuple[int, int]]:
    """Rows and sums of the windows with the smallest 0, 1, … of ``column``."""
    ordered = sorted(found, key=itemgetter(column))
    return list(accumulate(((rows, top) for *_, rows, top in ordered), _added, initial=(0, 0)))


def _added(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]


def of_device(
    stream: tuple[str, str], model: str, labelled: int, correct: int, profile: Profile
) -> tuple[object, ...]:
    """What labels that a device told with its rows' own ``profile`` add to ``truth``."""
    key = (*stream, 0, model, labelled, correct)
    if not _estimates(profile):
        return (*key, 0, 0, 0.0)
    return (*key, labelled, correct, labelled * int(profile.sums[0]) / profile.rows / FIXED_POINT)
