"""The service over a real broker: killed, restarted, misled, and asked for a rollout."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from prometheus_client.parser import text_string_to_metric_families

from aggregator.adapters.ledger import Ledger
from aggregator.adapters.windows import Windows
from aggregator.config import IngestConfig, MetricsConfig, RetrainConfig, load
from aggregator.records import RetrainRequest, Selection
from aggregator.service import Service
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.messages import ModelReport
from edge_runtime.contract.profile import merge_all
from tests.services import Mosquitto, find_mosquitto, free_port, missing_service
from tests.support.fleet import (
    FLEET,
    MODEL,
    OTHER_SESSION,
    SESSION,
    SPEC,
    TOPICS,
    A,
    event,
    publish_artifact,
    window,
    wire,
)
from tests.support.flood import flood
from tests.support.ledger_kit import LOOK
from tests.support.mqtt_device import MqttDevice
from tests.support.window_kit import put
from trainer.publish import Repository

WAIT_SECONDS = 30.0


class Site:
    """One fleet's aggregator, its devices, and a broker."""

    def __init__(self, folder, broker):
        self.folder = folder
        self.broker = broker
        self.key = Ed25519PrivateKey.generate()
        pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        (folder / "director.json").write_text(
            json.dumps({"keyid": "k", "private_key_pem": pem}), encoding="utf-8"
        )
        _, self.digest = publish_artifact(folder / "registry")
        self.path = folder / "aggregator.toml"
        self.path.write_text(
            f"""
            fleet = "{FLEET}"
            director_key = "director.json"
            [broker]
            host = "127.0.0.1"
            port = {broker.port}
            keepalive_seconds = 5
            [ingest]
            rebirth_seconds = 0.2
            [drift]
            check_seconds = 0.2
            [rollout]
            stages = [1, 1.0]
            tick_seconds = 0.05
            gates = {{bake_seconds = 0.1}}
            """,
            encoding="utf-8",
        )
        self.config = load(self.path)
        self.devices = []

    def device(self, name, **options):
        made = MqttDevice(name, self.broker.port, **options)
        self.devices.append(made)
        return made

    def wait(self, condition, what):
        """Lets the devices work until ``condition`` holds."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited too long for {what}"
            for device in self.devices:
                device.step()
            threading.Event().wait(0.005)

    def windows(self, read):
        store = Windows(self.config.windows_path, read_only=True)
        try:
            return read(store)
        finally:
            store.close()

    def ledger(self, read):
        store = Ledger(self.config.ledger_path)
        try:
            return read(store)
        finally:
            store.close()

    def start(self):
        """The service as a process of its own, which can be killed."""
        log = (self.folder / "aggregator.log").open("ab")
        with log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.support.run_aggregator", str(self.path)],
                stdin=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(Path.cwd())},
            )

    @contextmanager
    def running(self, config=None):
        """The service in a thread of this process."""
        stop = threading.Event()
        service = Service(config or self.config)
        failure = []

        def run():
            try:
                service.run(stop)
            except BaseException as e:
                failure.append(e)
                raise

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield service
        finally:
            stop.set()
            thread.join(WAIT_SECONDS)
            assert not failure
            assert not thread.is_alive()

    def order(self, kind, **document):
        number = self.ledger(
            lambda it: it.request(
                kind, {"model": MODEL, **document}, by="ann", why="because", now_ns=time.time_ns()
            )
        )
        self.wait(lambda: self.ledger(lambda it: it.answer(number))[0] != "pending", f"an answer to {kind}")
        return self.ledger(lambda it: it.answer(number))


@pytest.fixture
def site(tmp_path, mosquitto):
    made = Site(tmp_path, mosquitto)
    yield made
    for device in made.devices:
        device.close()


@pytest.fixture
def repository_folder(repository, monkeypatch):
    monkeypatch.chdir(repository)


def end(process, how):
    process.send_signal(how)
    process.wait(WAIT_SECONDS)


@pytest.mark.usefixtures("repository_folder")
def test_every_acknowledged_window_is_stored_once_whatever_is_killed(site):
    """The service dies by SIGKILL, then the broker does; a poisoned message comes every now and then."""
    names = [f"dev-{i}" for i in range(4)]
    sent = {
        name: [window(name, seq, labelled=10, correct=seq % 10) for seq in range(1, 81)] for name in names
    }
    total = sum(map(len, sent.values()))
    process = site.start()
    try:
        for name, windows in sent.items():
            site.device(name).put(windows)

        def acked():
            return sum(len(device.acked) for device in site.devices)

        def stored_covers_acked():
            known = {(w.device, w.seq) for w in site.windows(lambda it: tuple(it.windows(Selection())))}
            told = {(device.name, seq) for device in site.devices for seq in device.acked}
            assert told <= known

        site.wait(lambda: acked() >= total // 4, "the first acknowledgements")
        site.devices[0].say(TOPICS.window(DeviceId("dev-0"), MODEL), b"\xc1 poison")
        end(process, signal.SIGKILL)
        stored_covers_acked()
        process = site.start()
        site.wait(lambda: acked() >= total // 2, "acknowledgements after the service died")
        site.broker.kill()
        site.broker.start()
        site.devices[1].say(TOPICS.window(DeviceId("dev-0"), MODEL), b"\xc1 poison again")
        site.wait(lambda: acked() >= total * 3 // 4, "acknowledgements after the broker died")
        end(process, signal.SIGKILL)
        stored_covers_acked()
        process = site.start()
        site.wait(lambda: acked() == total, "every acknowledgement")
        site.devices[0].say(TOPICS.window(DeviceId("dev-0"), MODEL), b"\xc1 the last poison")
        site.wait(
            lambda: any(b"last" in d["payload"] for d in site.windows(Windows.dead_letters)),
            "the poison to be buried",
        )
    finally:
        end(process, signal.SIGTERM)
    assert process.returncode == 0
    (merged,) = site.windows(lambda it: it.profiles(Selection()))
    assert merged == merge_all(SPEC, [w.profile for ws in sent.values() for w in ws], probabilities=True)
    counted = site.windows(lambda it: it.totals(Selection(digest=A)))
    assert {t.device: (t.windows, t.labelled) for t in counted} == {DeviceId(n): (80, 800) for n in names}
    figures = site.windows(Windows.figures)
    assert figures.windows == total
    print(f"{total} windows stored once, {figures.duplicates_rejected} duplicates rejected")


class PowerCut(BaseException):
    pass


def cut_power(*_, **__):
    raise PowerCut


def run_until_power_cut(site, service):
    died = threading.Event()

    def run():
        try:
            service.run(threading.Event())
        except PowerCut:
            died.set()

    thread = threading.Thread(target=run)
    thread.start()
    site.wait(died.is_set, "the power cut")
    thread.join(WAIT_SECONDS)


def test_a_service_that_dies_after_the_commit_repeats_nothing(site, monkeypatch):
    device = site.device("dev-1")
    device.put([window(seq=1)])
    service = Service(site.config)
    monkeypatch.setattr(service._intake, "_say", cut_power)  # the acknowledgement is next
    run_until_power_cut(site, service)
    assert not device.acked
    assert site.windows(Windows.figures).windows == 1
    with site.running():
        site.wait(lambda: device.acked == {1}, "the acknowledgement")
    figures = site.windows(Windows.figures)
    assert figures.windows == 1
    assert figures.duplicates_rejected >= 1


def test_a_service_that_dies_before_the_commit_gets_the_message_again(site, monkeypatch):
    """From the broker's session: the device does not send it again, so it was not acknowledged to the broker."""
    service = Service(site.config)
    monkeypatch.setattr(service._windows, "append", cut_power)
    device = site.device("dev-1")
    site.wait(lambda: device.link.connected, "the device's connection")
    with site.running():  # makes the broker's session
        site.wait(lambda: site.ledger(Ledger.devices), "a birth")
    device.put([window(seq=1)])
    device.step()
    device.waiting.clear()
    run_until_power_cut(site, service)
    assert site.windows(Windows.figures).windows == 0
    with site.running():
        site.wait(lambda: device.acked == {1}, "the acknowledgement")
    assert site.windows(Windows.figures).windows == 1


def test_duplicates_are_acknowledged_too(site):
    with site.running():
        device = site.device("dev-1")
        device.put([window(seq=1), event(seq=2)])
        site.wait(lambda: device.acked == {1, 2}, "the first acknowledgement")
        device.acked.clear()
        device.put([window(seq=1), event(seq=2)])
        site.wait(lambda: device.acked == {1, 2}, "the second acknowledgement")
    figures = site.windows(Windows.figures)
    assert (figures.windows, figures.events, figures.duplicates_rejected) == (1, 1, 2)


def test_a_device_that_is_unknown_or_said_to_be_dead_is_asked_who_it_is(site):
    def online():
        return {d.device: d.online for d in site.ledger(Ledger.devices)}

    with site.running():
        shy = site.device("shy", births=False)
        shy.put([window("shy", 1)])
        site.wait(lambda: shy.commands, "a rebirth command")
        site.wait(lambda: online() == {"shy": True}, "the birth")
        other = site.device("late", session=OTHER_SESSION)
        site.wait(lambda: online() == {"shy": True, "late": True}, "two births")
        site.devices.remove(other)
        other.cut()
        site.wait(lambda: online() == {"shy": True, "late": False}, "the last will")
        site.devices.append(other)
        other.births = False  # it is back, but says so only when it is asked
        site.wait(lambda: online() == {"shy": True, "late": True}, "the device to be asked and to answer")
        assert other.commands


def test_a_rollout_goes_from_order_to_completion_over_the_wire(site):
    with site.running():
        devices = [site.device(f"dev-{i}") for i in range(4)]
        site.wait(lambda: len(site.ledger(Ledger.devices)) == 4, "four births")
        assert site.order("start_rollout", candidate="f" * 64)[0] == "refused"
        state, name = site.order("start_rollout", candidate=site.digest)
        assert state == "accepted"

        def rollout():
            return site.ledger(lambda it: it.rollout(name))

        site.wait(lambda: rollout().state == "completed", "the rollout's end")
        site.wait(
            lambda: all(d.releases[-1][0].revision == 3 for d in devices), "the last release everywhere"
        )
        assert all(d.report.serving == site.digest for d in devices)
        for device in devices:
            revisions = [release.revision for release, _ in device.releases]
            assert revisions == sorted(set(revisions))
            for _, signed in device.releases:
                ((keyid, signature),) = signed.signatures
                assert keyid == "k"
                site.key.public_key().verify(signature, signed.payload)
        final, _ = devices[0].releases[-1]
        assert (final.incumbent, final.candidate, final.threshold) == (site.digest, None, 0)

        # A broker that forgot its retained messages hears the release again.
        site.broker.stop()
        (site.folder / "mosquitto" / "mosquitto.db").unlink()
        site.broker.start()
        newcomer = site.device("newcomer")
        site.wait(lambda: newcomer.releases, "the release after the broker forgot it")
        assert newcomer.releases[0][0] == final
    audit = [row["what"] for row in site.ledger(lambda it: it.table("audit"))][::-1]
    assert audit == ["refused start_rollout", "start", "begin", "advance", "finish"]


def test_a_name_of_a_rollout_that_only_the_ledger_remembers_is_refused(site):
    with site.running():
        for name in ("spring", "summer"):
            assert site.order("start_rollout", candidate=site.digest, cohort="left", name=name) == (
                "accepted",
                name,
            )
            assert site.order("halt", cohort="left")[0] == "accepted"
        state, why = site.order("start_rollout", candidate=site.digest, cohort="right", name="spring")
        assert (state, "was used before, for tiny in cohort left (halted)" in why) == ("refused", True)


def test_a_refusing_canary_halts_the_rollout_over_the_wire(site):
    with site.running():
        devices = [site.device(f"dev-{i}", obeys=False) for i in range(3)]
        site.wait(lambda: len(site.ledger(Ledger.devices)) == 3, "three births")
        _, name = site.order("start_rollout", candidate=site.digest)
        site.wait(lambda: all(d.releases for d in devices), "the release")
        for device in devices:
            release, _ = device.releases[-1]
            canary = device.report
            if release.candidate and release.threshold:
                device.follow(release)
                if device.report.serving == site.digest:
                    device.report = type(canary)(
                        model=MODEL,
                        state="idle",
                        rollout=release.rollout,
                        revision=release.revision,
                        outcome="refused",
                        outcome_digest=site.digest,
                        reason="too slow",
                        quarantined=(site.digest,),
                    )
                    device.birth()
        site.wait(lambda: all(d.releases[-1][0].threshold == 0 for d in devices), "the halt")
        halted = site.ledger(lambda it: it.rollout(name))
        assert halted.state == "halted"
        assert "too slow" in halted.note


def test_a_device_that_is_silent_is_asked_and_away_when_it_does_not_answer(site, monkeypatch):
    """Nobody published its last will: the broker had forgotten it, or was not to pass it on."""
    monkeypatch.setattr("aggregator.leader.QUIET_NS", 1_000_000_000)

    def online():
        return {d.device: d.online for d in site.ledger(Ledger.devices)}

    with site.running():
        idle, gone = site.device("idle"), site.device("gone")
        site.wait(lambda: online() == {"idle": True, "gone": True}, "two births")
        site.devices.remove(gone)
        site.wait(lambda: online() == {"idle": True, "gone": False}, "the silent one to count as away")
        assert idle.commands  # it has nothing to send, so it was asked as well, and answered
    gone.close()


def test_a_device_comes_back_after_a_second_machine_used_its_name(site, caplog):
    with site.running():
        site.device("dev")

        def known():
            return {(d.session, d.online) for d in site.ledger(Ledger.devices)}

        site.wait(lambda: known() == {(SESSION, True)}, "the device")
        second = MqttDevice("dev", site.broker.port, session=OTHER_SESSION)
        site.devices.append(second)
        site.wait(lambda: (OTHER_SESSION, True) in known(), "the second machine")
        site.devices.remove(second)
        second.close()
        site.wait(lambda: known() == {(SESSION, True)}, "the device again")
    assert caplog.text.count("two machines use this id device=dev") == 1


def test_a_fleet_whose_ledger_was_lost_is_led_again(site):
    """The device runs the candidate already, under a revision that this ledger does not know of."""
    first = site.device("dev", obeys=False)
    followed = {"state": "committed", "serving": site.digest, "rollout": "before", "revision": 1011}
    with site.running():
        site.wait(lambda: site.ledger(Ledger.devices), "the first birth")
        _, name = site.order("start_rollout", candidate=site.digest)
        site.wait(lambda: first.releases, "the release")
        first.report = ModelReport(model=MODEL, **followed)
        first.birth()
        site.wait(lambda: first.releases[-1][0].revision > 1011, "a release that the device takes")
        assert site.ledger(lambda it: it.rollout(name)).stage == 1
        first.obeys = True
        first.follow(first.releases[-1][0])
        site.wait(lambda: site.ledger(lambda it: it.rollout(name)).state == "completed", "the rollout's end")
    assert "renumber" in [row["what"] for row in site.ledger(lambda it: it.table("audit"))]


def test_an_order_that_devices_would_refuse_is_refused_until_the_new_key_is_there(site, tmp_path):
    """The director's key was replaced, and the aggregator has a copy of the old one."""
    repository = Repository.create(tmp_path / "elsewhere" / "repository")
    with site.running():
        device = site.device("dev")
        _, name = site.order("start_rollout", candidate=site.digest, gates={"bake_seconds": 600.0})
        site.wait(lambda: device.releases, "the release")
        shutil.copytree(tmp_path / "elsewhere" / "repository" / "metadata", site.folder / "metadata")
        state, why = site.order("halt")
        assert (state, "director.json holds the key k" in why) == ("refused", True)
        assert site.ledger(lambda it: it.rollout(name)).state == "running"

        shutil.copyfile(repository.director_key, site.folder / "director.json")
        keyid = json.loads(repository.director_key.read_text(encoding="utf-8"))["keyid"]
        site.wait(lambda: device.releases[-1][1].signatures[0][0] == keyid, "the release, signed again")
        assert site.order("halt") == ("accepted", name)
        site.wait(lambda: device.releases[-1][0].threshold == 0, "the halt")
        assert device.releases[-1][1].signatures[0][0] == keyid


def test_the_retrain_hook_runs_once_and_its_end_is_recorded(site):
    wish = RetrainRequest(model=MODEL, digest=A, cohort="fleet", at_ns=1, why="drift", document='{"n": 1}')
    script = (
        f"import sys; print(sys.argv[1], open({str(site.folder / 'ran')!r}, 'a').write('x')); sys.exit(4)"
    )
    config = replace(site.config, retrain=RetrainConfig(command=(sys.executable, "-c", script, "{request}")))

    def ask(ledger):
        with ledger.transaction():
            return ledger.put_retrain(wish, "waiting"), ledger.put_retrain(wish, "running")

    def states():
        return {row["id"]: row["state"] for row in site.ledger(lambda it: it.table("retrains"))}

    waiting, running = site.ledger(ask)
    with site.running(config):
        site.wait(lambda: states()[waiting] == "failed", "the hook's end")
    assert states() == {waiting: "failed", running: "interrupted"}
    row = next(r for r in site.ledger(lambda it: it.table("retrains")) if r["id"] == waiting)
    assert row["exit_code"] == 4
    assert f"request-{waiting}.json" in row["output"]
    assert (site.folder / "ran").read_text() == "x"


def test_a_persistent_session_brings_what_came_while_the_service_was_away(site):
    with site.running():
        device = site.device("dev-1")
        site.wait(lambda: len(site.ledger(Ledger.devices)) == 1, "a birth")
    device.put([window(seq=seq) for seq in range(1, 11)])
    for _ in range(20):
        device.step()
        threading.Event().wait(0.005)
    device.waiting.clear()  # never sent again: only the broker's session has them now
    with site.running():
        site.wait(lambda: site.windows(Windows.figures).windows == 10, "what the broker kept")


FLOOD = 20_000
SENDERS = 20


def test_what_is_older_than_the_retention_is_rolled_up_while_the_service_runs(site):
    day_ns = 86_400 * 10**9
    now_ns = time.time_ns()
    old, new = [window("dev-1", seq) for seq in range(1, 600)], window("dev-1", 600)
    (site.folder / "state").mkdir(exist_ok=True)
    with closing(Windows(site.config.windows_path)) as store:
        put(store, *old, at=now_ns - 3 * day_ns)
        put(store, new, at=now_ns)
        before = store.profiles(Selection())
    with closing(Ledger(site.config.ledger_at)) as ledger, ledger.transaction():
        for index, at_ns in enumerate((now_ns - 4 * day_ns, now_ns - 3 * day_ns, now_ns)):
            ledger.put_look(A, MODEL, replace(LOOK, index=index), at_ns)
    with site.running(replace(site.config, ingest=IngestConfig(retention_days=2.0))):
        site.wait(
            lambda: site.windows(lambda it: tuple(it.windows(Selection()))) == (new,),
            "the old to be rolled up",
        )
    assert site.windows(lambda it: it.profiles(Selection())) == before
    assert [row["look"] for row in site.ledger(lambda it: it.table("look_times"))] == [2]


def test_a_flood_of_one_device_delays_nobody_else(tmp_path, repository, monkeypatch):
    """20,000 windows of one device stand in the broker's queue before anything that 20 others send."""
    monkeypatch.chdir(repository)
    binary = find_mosquitto()
    if binary is None:
        missing_service("mosquitto is not installed (Debian: apt-get install mosquitto)")
    folder = tmp_path / "mosquitto"
    folder.mkdir()
    broker = Mosquitto(binary, folder, extra_config="max_queued_messages 0\nlog_type error")
    broker.start()
    site = Site(tmp_path, broker)
    try:
        with site.running():  # makes the broker's session
            site.device("dev-0").put([window("dev-0", 1)])
            site.wait(lambda: site.devices[0].acked, "the subscription")
        topic, payload = wire(window("loud", 1))
        assert flood(broker.port, ((topic, payload) for _ in range(FLOOD))) == FLOOD
        names = [f"quiet-{i}" for i in range(SENDERS)]
        for name in names:
            site.device(name).put([window(name, seq) for seq in range(1, 6)])
        batches = []
        monkeypatch.setattr(Service, "_note", lambda _, batch: batches.append(batch))
        with site.running():
            site.wait(lambda: all(len(d.acked) == 5 for d in site.devices[1:]), "everyone's acknowledgements")
        counted = {t.device: t.windows for t in site.windows(lambda it: it.totals(Selection(digest=A)))}
        assert counted == {"dev-0": 1, "loud": 1, **dict.fromkeys(names, 5)}
        looked_at = sum(batch.messages for batch in batches)
        shed = sum(batch.shed for batch in batches)
        assert shed > FLOOD / 2
        assert looked_at < FLOOD / 2
        print(f"{len(batches)} batches, {looked_at} messages looked at, {shed} shed")
    finally:
        for device in site.devices:
            device.close()
        broker.close()


def test_the_page_for_prometheus_tells_what_came_in_and_who_is_there(site):
    port = free_port()
    config = replace(site.config, metrics=MetricsConfig(listen=f"127.0.0.1:{port}", refresh_seconds=0.1))

    def scraped():
        try:
            with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            return {}
        return {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    with site.running(config):
        device = site.device("dev-1")
        device.put([window(seq=seq) for seq in range(1, 6)])
        site.wait(lambda: len(device.acked) == 5, "the acknowledgements")
        device.say(TOPICS.window(DeviceId("dev-1"), MODEL), b"\xc1 poison")
        site.wait(lambda: scraped().get(("skiff_ingest_dead_letters_total", "payload")) == 1, "the poison")
        site.wait(lambda: scraped().get(("skiff_store_windows_total",)) == 5, "a refreshed page")
        found = scraped()
    assert found["skiff_ingest_windows_total",] == 5
    assert found["skiff_store_rows_total",] == 100
    assert 1 <= found["skiff_ingest_acks_total",] <= 5
    assert found["skiff_ingest_batch_seconds_count",] >= found["skiff_store_commit_seconds_count",] >= 2
    assert found["skiff_link_connected", "aggregator"] == found["skiff_link_connected", "coordinator"] == 1
    assert (found["skiff_leader",], found["skiff_fleet_devices_online",]) == (1, 1)
    assert time.time() - 60 < found["skiff_ingest_newest_window_timestamp_seconds",] <= time.time()
    with pytest.raises(OSError, match="refused"):
        urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)
