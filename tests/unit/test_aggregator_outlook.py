"""The fleet at one moment, counted from real stores."""

from contextlib import closing
from dataclasses import replace

from aggregator.adapters.ledger import Ledger
from aggregator.adapters.windows import Windows
from aggregator.looks import Trace
from aggregator.outlook import outlook
from aggregator.records import RetrainRequest, Track
from tests.support.fleet import MODEL, NOW, SECOND, A, B, device, window
from tests.support.ledger_kit import ALARM, OPEN, OUTPUT, RELEASE, ROLLOUT, VERDICT
from tests.support.window_kit import put


def test_what_stands_is_counted(tmp_path):
    with (
        closing(Ledger(tmp_path / "ledger.sqlite")) as ledger,
        closing(Windows(tmp_path / "windows.sqlite")) as windows,
    ):
        with ledger.transaction():
            ledger.put_verdicts(A, (VERDICT, replace(VERDICT, cohort="wrist=left")))
            ledger.put_verdicts(B, (replace(VERDICT, kind="drift", outcome="stable"),))
            traces = (
                OPEN,
                Trace(cohort="fleet", key="b", alarm=replace(ALARM, feature="b")),
                Trace(cohort="fleet", key="c", alarm=replace(ALARM, severity="page")),
                Trace(cohort="fleet", key="the accuracy", alarm=OUTPUT),
                Trace(cohort="fleet", key="z", alarm=replace(ALARM, kind="sensor")),
            )
            ledger.put_traces(A, MODEL, traces, NOW)
            ledger.put_traces(A, MODEL, (Trace(cohort="fleet", key="z"),), NOW)
            unread = "every device's histograms: too long to be read to be counted"
            wish = RetrainRequest(model=MODEL, digest=A, cohort="fleet", at_ns=NOW, why="", document=unread)
            ledger.put_retrain(wish, "waiting")
            ledger.put_track(Track(cohort=RELEASE.cohort, model=MODEL, release=RELEASE, rollout=ROLLOUT))
        put(windows, window("dev-1", rows=20))
        records = [device("dev-1"), device("dev-2"), device("dev-3", online=False)]
        sent = {"dev-1": NOW, "dev-2": NOW - 61 * SECOND, "dev-3": 0}
        found = outlook(
            ledger, windows, records, sent_ns=sent.__getitem__, silent_before_ns=NOW - 60 * SECOND
        )
    assert (found.known, found.online, found.silent) == (3, 2, 1)
    assert (found.store.windows, found.store.rows) == (1, 20)
    assert found.verdicts == (("drift", "stable", 1), ("skew", "warning", 2))
    assert found.incidents == (("drift", "page", 1), ("drift", "ticket", 2), ("performance", "page", 1))
    assert found.retrains == (("waiting", 1),)
    assert found.rollouts == (("running", 1),)
    assert [(model, q) for model, q, _ in found.latency] == [(MODEL, 0.5), (MODEL, 0.9), (MODEL, 0.99)]
