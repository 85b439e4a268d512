"""Writes the stores of this version: ``python -m tests.golden.make_stores`` from the root of the checkout.

One file of each store and version is kept for ever, as the code of that version wrote it: an aggregator may be
upgraded from any of them. Run this once for a new version, before it is released; a file that exists is left alone.
`test_store_versions.py` reads every one of them.
"""

import shutil
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Final

from aggregator.adapters import ledger as ledger_module
from aggregator.adapters import windows as windows_module
from aggregator.adapters.ledger import Ledger
from aggregator.adapters.windows import Windows
from aggregator.looks import Alarm, Look, Reading, Slice, Trace, Verdict
from aggregator.records import Arrival, AuditEntry, DeadLetter, DeviceRecord, RetrainRequest, Telling, Track
from edge_runtime.contract.codec import encode
from edge_runtime.contract.ids import CohortId, DeviceId, RolloutId
from edge_runtime.contract.release import EVERYONE, Release
from tests.support.fleet import (
    FLEET,
    MODEL,
    NOW,
    OTHER_SESSION,
    SECOND,
    SESSION,
    A,
    B,
    event,
    labels,
    report,
    window,
)

FOLDER: Final = Path(__file__).parent / "stores"
DEVICE: Final = DeviceRecord(
    device=DeviceId("dev-1"),
    session=SESSION,
    seq=7,
    online=True,
    attributes=(("cohort", "beta"), ("site", "north")),
    models=(report(state="committed", serving=A, revision=3),),
    last_seen_ns=NOW,
    ended=((OTHER_SESSION, -1),),
)
RELEASE: Final = Release(
    fleet=FLEET,
    cohort=CohortId("main"),
    model=MODEL,
    rollout=RolloutId("r1"),
    revision=4,
    threshold=EVERYONE,
    candidate=B,
    incumbent=None,
)
WINDOWS: Final = (
    *(window("dev-1", seq, labelled=10, correct=seq, refused=(("width", 1),)) for seq in (1, 2, 4)),
    window("dev-1", 9, seq_lo=6),
    window("dev-2", 1, model=B),
    window("dev-2", 1, session=OTHER_SESSION),
)
ALARM: Final = Alarm(
    kind="skew",
    feature="a",
    cohort="fleet",
    opened_window=1,
    closed_window=None,
    devices=(DeviceId("dev-1"),),
    severity="ticket",
    why="a moved",
    evidence=(("p", 0.001), ("from", "left")),
)
TRACE: Final = Trace(cohort="fleet", key="a", streak=2, alarm=ALARM)
VERDICT: Final = Verdict(
    kind="skew",
    model=MODEL,
    digest=A,
    cohort="fleet",
    at_ns=NOW,
    outcome="drifted",
    reason="a moved",
    moved=("a",),
    left_out=((DeviceId("dev-3"), "3 of 100 rows"),),
)
LOOK: Final = Look(index=1, devices=1, rows=20, figures={}, suspects={"b": (DeviceId("dev-1"),)})
TELLING: Final = Telling(sink="mqtt", incident=1, at_ns=NOW, text="{}")
LABELS: Final = (labels("dev-1", 1), labels("dev-1", 2, correct=3), labels("dev-2", 1, model=B))
UNJUDGED: Final = window("dev-3", 1, model=B)


def write_ledger(where: Path | str) -> None:
    """A device, a track, an audit entry, two orders, cursors, a retrain request, an untold event, two incidents."""
    with closing(Ledger(where)) as ledger:
        order = ledger.request("halt", {"model": MODEL}, by="ann", why="no", now_ns=NOW)
        ledger.request("resume", {"model": MODEL}, by="bob", why="yes", now_ns=NOW)
        with ledger.transaction():
            ledger.put_device(DEVICE)
            ledger.put_track(Track(cohort=CohortId("main"), model=MODEL, release=RELEASE))
            ledger.put_audit(AuditEntry(at_ns=NOW, who="ann", what="start", why="because", model=MODEL))
            ledger.put_answer(order, accepted=False, reason="there is none")
            ledger.put_cursor(A, DeviceId("dev-1"), 4)
            ledger.put_label_cursor(A, DeviceId("dev-1"), 2)
            ledger.put_retrain(
                RetrainRequest(model=MODEL, digest=A, cohort="fleet", at_ns=NOW, why="drift", document="{}"),
                "waiting",
            )
            profile = WINDOWS[0].profile
            first = Reading(device=DeviceId("dev-1"), profile=profile, start_ns=NOW, end_ns=NOW + 1)
            ledger.put_first_look(A, Slice(index=0, start_ns=NOW, end_ns=NOW + 1, readings=(first,)))
            ledger.put_look(A, MODEL, LOOK, NOW, 4)
            ledger.put_tellings((TELLING,))
            ledger.put_verdicts(A, (VERDICT,))
            for at, trace in ((0, TRACE), (5, replace(TRACE, alarm=None)), (9, TRACE)):
                ledger.put_traces(A, MODEL, (trace,), NOW + at)


def write_windows(path: Path) -> None:
    """`WINDOWS`, a second apart, one that nobody has judged, an event, a dead letter and `LABELS`."""
    with closing(Windows(path)) as store:
        for i, w in enumerate(WINDOWS):
            store.append([Arrival(window=w, payload=encode(w), judged=True)], [], [], NOW + i * SECOND)
        waiting = Arrival(window=UNJUDGED, payload=encode(UNJUDGED), judged=False)
        store.append(
            [waiting], [event("dev-1", 3)], [DeadLetter("topic", b"payload", "why")], NOW, labels=LABELS
        )


def main() -> None:
    """Writes what is missing."""
    FOLDER.mkdir(exist_ok=True)
    for name, version, write in (
        ("ledger", ledger_module.VERSION, write_ledger),
        ("windows", windows_module.VERSION, write_windows),
    ):
        target = FOLDER / f"{name}-{version}.sqlite"
        if target.exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / target.name
            write(made)
            with closing(sqlite3.connect(made)) as db:
                db.execute("PRAGMA journal_mode=DELETE")
                db.execute("VACUUM")
            shutil.copyfile(made, target)
        print(f"{target.name}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
