"""An aggregator with a full disk or locked stores: nothing acknowledged is lost, and it needs no restart."""

import sqlite3
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

import pytest

from aggregator import service as service_module
from aggregator.adapters import database
from aggregator.adapters.ledger import Ledger
from aggregator.adapters.windows import Windows
from aggregator.config import AggregatorConfig, IngestConfig, MetricsConfig
from aggregator.leader import Leader
from aggregator.records import Lease, Selection
from aggregator.stores import StoreError
from edge_runtime.contract.profile import merge_all
from edge_runtime.contract.release import Release
from tests.integration.test_aggregator_service import Site
from tests.support.disks import filled, may_mount, tmpfs
from tests.support.fleet import FLEET, SPEC, window

needs_mount = pytest.mark.skipif(not may_mount(), reason="mounting file systems needs CAP_SYS_ADMIN")
NAMES = ("dev-0", "dev-1", "dev-2")


@contextmanager
def full_disk(site):
    with filled(site.folder / "state"):
        yield


@contextmanager
def locked(site):
    """Somebody else writes and does not end."""
    with ExitStack() as stack:
        for path in (site.config.windows_path, site.config.ledger_path):
            db = stack.enter_context(closing(sqlite3.connect(path, isolation_level=None)))
            db.execute("BEGIN IMMEDIATE")
        yield


@pytest.fixture
def site(tmp_path, mosquitto, monkeypatch):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(service_module, "CALM_SECONDS", 0.5)
    with ExitStack() as stack:
        if may_mount():
            stack.enter_context(tmpfs(tmp_path / "state", "4m"))
        made = Site(tmp_path, mosquitto)
        yield made
        for device in made.devices:
            device.close()


@pytest.mark.parametrize(
    "trouble", [pytest.param(full_disk, marks=needs_mount), pytest.param(locked, marks=pytest.mark.slow)]
)
def test_what_cannot_be_stored_is_not_acknowledged_and_comes_in_once_there_is_room(site, trouble, caplog):
    sent = {name: [window(name, seq) for seq in range(1, 101)] for name in NAMES}

    def acked():
        return {(device.name, seq) for device in site.devices for seq in device.acked}

    def stored():
        return {(w.device, w.seq) for w in site.windows(lambda it: tuple(it.windows(Selection())))}

    def said(word):
        return [r.getMessage() for r in caplog.records if r.getMessage().startswith(word)]

    caplog.set_level("INFO")
    config = replace(site.config, metrics=MetricsConfig(listen="127.0.0.1:0", refresh_seconds=0.05))
    with site.running(config) as service:
        for name in NAMES:
            site.device(name).put(sent[name][:50])
        site.wait(lambda: len(acked()) == 150, "the first half")
        with trouble(site):
            for device in site.devices:
                device.put(sent[device.name][50:])
            late = site.device("late")
            late.put([window("late", 1)])
            site.wait(lambda: said("store_failed part=intake"), "the trouble to be told")
            errors = service._page.registry.get_sample_value
            site.wait(
                lambda: (errors("skiff_store_errors_total", {"part": "intake"}) or 0) >= 3, "three attempts"
            )
            assert acked() <= stored()
            assert errors("skiff_store_failing", {"part": "intake"}) == 1
        site.wait(lambda: len(acked()) == 301, "the second half")
        site.wait(lambda: len(site.ledger(Ledger.devices)) == 4, "every birth")
        site.wait(lambda: said("store_works part=intake"), "the end of the trouble")
        assert errors("skiff_store_failing", {"part": "intake"}) == 0
        assert site.order("start_rollout", candidate=site.digest)[0] == "accepted"
    assert len(said("store_failed part=intake")) == len(said("store_works part=intake")) == 1
    assert acked() == stored()
    with closing(Windows(site.config.windows_path, read_only=True)) as store:
        selection = Selection(devices=tuple(device.device for device in site.ledger(Ledger.devices)))
        (merged,) = store.profiles(selection)
    everything = [w.profile for ws in sent.values() for w in ws] + [window("late", 1).profile]
    assert merged == merge_all(SPEC, everything, probabilities=True)


def test_the_loop_rests_while_nothing_can_be_taken_in_though_it_goes_on_leading(tmp_path, monkeypatch):
    rests: list[float] = []
    led: list[object] = []
    config = AggregatorConfig(fleet=FLEET, state_dir=tmp_path / "state", registry=tmp_path / "registry")
    service = service_module.Service(config)

    def fails():
        raise StoreError("the disk is full")

    def leads(senders):
        led.append(senders)
        return True

    monkeypatch.setattr(service._intake, "step", fails)
    monkeypatch.setattr(service, "_lead_on", leads)
    monkeypatch.setattr(time, "sleep", rests.append)
    for _ in range(3):
        service._step()
    service._close()
    assert rests == [service_module.REST_SECONDS] * 3
    assert len(led) == 3


def test_who_loses_the_lease_while_it_takes_over_does_not_lead_and_goes_on(tmp_path, monkeypatch):
    folders = {"state_dir": tmp_path / "state", "registry": tmp_path / "registry"}
    config = AggregatorConfig(fleet=FLEET, ingest=IngestConfig(share="aggregators"), **folders)
    service = service_module.Service(config)

    def is_paused_meanwhile():
        with closing(Ledger(config.ledger_at)) as other:
            mine = other.lease()
            assert mine is not None
            assert other.swap_lease(mine, Lease("other", mine.term + 1))
        service._ledger.move_retrain(1, "interrupted")  # what a leader writes first

    monkeypatch.setattr(service._intake, "step", frozenset)
    monkeypatch.setattr(service, "_lead", is_paused_meanwhile)
    service._step()
    assert service._election is not None
    assert (service._leader, service._election.held) == (None, None)
    assert service._ledger.lease() == Lease("other", 2)
    service._close()


def test_what_a_failing_ledger_did_not_keep_was_not_decided(site, monkeypatch):
    """The ledger refuses every second transaction of the leader: what is published is what it kept, in order."""
    plain = Ledger.transaction
    began: list[None] = []
    releases: list[Release] = []

    @contextmanager
    def fails_every_other_time(self):
        if self is service._ledger:
            began.append(None)
            if len(began) % 2:
                raise StoreError("the disk is full")
        with plain(self):
            yield

    def publishes(self, action):
        releases.append(action.release)
        kept = {track.release for track in site.ledger(Ledger.tracks)}
        assert action.release in kept

    monkeypatch.setattr(Leader, "_publish", publishes)
    monkeypatch.setattr(service_module.Service, "_delay", lambda self, attempt: 0.01)
    with site.running() as service:
        monkeypatch.setattr(Ledger, "transaction", fails_every_other_time)
        site.device("dev-0")
        site.wait(lambda: len(site.ledger(Ledger.devices)) == 1, "its birth")
        assert site.order("start_rollout", candidate=site.digest)[0] == "accepted"
        site.wait(lambda: releases, "a release")
        monkeypatch.setattr(Ledger, "transaction", plain)
        assert site.order("halt")[0] == "accepted"
    assert len(began) >= 4
    audit = [row["what"] for row in site.ledger(lambda it: it.table("audit"))][::-1]
    assert audit.count("start") == audit.count("halt") == 1
    revisions = [release.revision for release in releases]
    assert revisions == sorted(revisions)
    assert set(revisions) == set(range(1, max(revisions) + 1))
