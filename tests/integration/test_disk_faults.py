"""The disk refuses the Nth call of an install, for every N: the device serves, says why, and installs afterwards.

Calls that SQLite makes for the outbox are not among them; tests/unit/test_outbox_disk.py has those.
"""

import errno
import os
import shutil
from dataclasses import dataclass

import pytest

from edge_runtime.contract.codec import decode
from edge_runtime.contract.errors import ArtifactError
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.messages import Event
from edge_runtime.keeper import Keeper
from edge_runtime.loading import load_model
from tests.publisher import MODEL
from tests.support.crash_bench import Bench, Device, heavy
from tests.support.device import whole_state
from tests.support.recorder import Fault, Recorder, Write

SHORT = 0
CODES = (errno.ENOSPC, errno.EROFS, errno.EIO)
SAID = {"update_delayed", "state_unsaved", "release_refused"}
ENOUGH_TURNS = 12


@dataclass
class Setting:
    """A device whose first model is committed, and a release of another one."""

    bench: Bench
    home: object
    old: Digest
    new: Digest
    message: bytes


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    bench = Bench.make(folder)
    old, new = bench.publish(heavy(1)), bench.publish(heavy(2))
    device = Device(bench.configure(folder / "device"), bench.clocks)
    with bench.standing():
        device.boot()
        device.hear(bench.offer(old))
        device.turn_until(lambda s: s.committed == old and s.trial is None, rows=8)
        device.power_off()
    return Setting(bench, folder / "device", old, new, bench.offer(new))


@pytest.fixture
def install(setting, tmp_path, monkeypatch):
    """Installs under a fault, then without it, on a fresh copy of the device; returns the recorder and the outcome."""
    events: list[Event] = []
    real = Keeper.append

    def append(keeper, action):
        message = decode(action.payload)
        if isinstance(message, Event):
            events.append(message)
        real(keeper, action)

    monkeypatch.setattr(Keeper, "append", append)

    def run(fault, *, restarted=False):
        events.clear()
        home = tmp_path / "device"
        shutil.copytree(setting.home, home)
        config = setting.bench.configure(home)
        recorder = Recorder(home, fault=fault)
        device = Device(config, setting.bench.clocks)
        with setting.bench.standing():
            with recorder.standing():
                device.boot()
                device.hear(setting.message)
                for _ in range(ENOUGH_TURNS):
                    assert device.serving in (setting.old, setting.new)
                    device.turn(rows=8)
                assert device.serving in (setting.old, setting.new)
            done = device.slots.committed == setting.new and not device.daemon._unsaved
            said = [e for e in events if e.name in SAID]
            if restarted:
                device.reboot()
                device.hear(setting.message)
            device.turn_until(lambda s: s.committed == setting.new and s.trial is None, rows=8)
            device.turn_until(lambda _: not device.daemon._unsaved)
            assert device.serving == setting.new
            device.power_off()
        state = whole_state(config.state_dir, MODEL)
        assert (state.committed, state.previous, state.quarantine) == (setting.new, setting.old, ())
        shutil.rmtree(home)
        return recorder, done, said

    return run


def check(install, fault, *, restarted):
    recorder, done, said = install(fault, restarted=restarted)
    assert recorder.calls >= fault.at, "the fault was never met"
    if fault.code == SHORT:
        assert done, "a short write is no failure"
        assert said == []
    elif not done:
        reasons = [dict(event.detail)["reason"] for event in said]
        assert any(os.strerror(fault.code) in reason for reason in reasons), (fault, reasons)
    return recorder, done


def written(recorder):
    return [change for change in recorder.changes if isinstance(change, Write)]


def test_the_disk_refuses_some_calls_of_an_install(install):
    """Some of what the next tests do, each fault and each kind of call at some time."""
    whole, done, said = install(None)
    assert said == []
    assert done
    assert whole.calls > 50
    assert check(install, Fault(1, errno.EROFS, lasting=True), restarted=False)[1] is False
    outcomes = {
        check(install, Fault(at, CODES[n % 3], lasting=n % 2 == 0), restarted=n % 4 < 2)[1]
        for n, at in enumerate(range(2, whole.calls, 7))
    }
    assert outcomes == {True, False}
    ours = [n for n, write in zip(whole.writes, written(whole), strict=True) if "scratch" not in write.path]
    assert len(ours) > 8
    assert all(check(install, Fault(at, SHORT), restarted=False)[0].shortened for at in ours[::2])


def test_a_model_that_cannot_be_read_is_tried_once_more(setting, tmp_path):
    config, path = setting.bench.configure(tmp_path), tmp_path / "model.onnx"
    path.write_bytes(heavy(1))
    with Recorder(tmp_path, fault=Fault(1, errno.EIO, reading=True)).standing() as recorder:
        assert load_model(path, setting.old, config).digest == setting.old
    assert recorder.reads == 2
    broken = Recorder(tmp_path, fault=Fault(1, errno.EIO, lasting=True, reading=True))
    with broken.standing(), pytest.raises(ArtifactError, match=r"cannot be read \(Input/output error\)"):
        load_model(path, setting.old, config)
    assert broken.reads == 2


@pytest.mark.slow
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_the_disk_refuses_every_call_of_an_install(install, code, lasting):
    whole, _, _ = install(None)
    outcomes = [
        check(install, Fault(at, code, lasting=lasting), restarted=at % 2 == 0)[1]
        for at in range(1, whole.calls + 1)
    ]
    print(f"{errno.errorcode[code]}: {len(outcomes)} calls, installed all the same {sum(outcomes)}")
    assert not all(outcomes)
    assert lasting is False or not any(outcomes[: len(outcomes) // 2])


@pytest.mark.slow
def test_every_write_of_an_install_may_be_short(install):
    whole, _, _ = install(None)
    shortened = [check(install, Fault(at, SHORT), restarted=False)[0].shortened for at in whole.writes]
    print(f"{sum(shortened)} short writes")
    assert len(shortened) > 10
    assert all(shortened)


@pytest.mark.slow
def test_every_file_may_be_unreadable_for_once(install):
    """A worn sector that reads well the next time: no start without a model, no good model quarantined for it."""
    whole, _, _ = install(None)
    for at in range(1, whole.reads + 1):
        install(Fault(at, errno.EIO, reading=True), restarted=at % 2 == 0)
    print(f"{whole.reads} files were opened to be read")
    assert whole.reads > 20


# ── bad sectors ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def install_on_bad_sector(setting, tmp_path):
    """Installs where one file can never be read again from its Nth read of all files on; the device and its disk."""

    def run(at=0):
        home = tmp_path / "device"
        shutil.copytree(setting.home, home)
        fault = Fault(at, errno.EIO, reading=True, sector=True) if at else None
        device = Device(setting.bench.configure(home), setting.bench.clocks)
        with setting.bench.standing(), Recorder(home, fault=fault).standing() as recorder:
            device.boot()
            device.hear(setting.message)
            for _ in range(3 * ENOUGH_TURNS):
                device.turn(rows=8)
            device.power_off()
        shutil.rmtree(home)
        return device, recorder

    return run


def check_healed(setting, device, recorder, at):
    """What was not provisioned by hand was written anew, and no model is condemned."""
    path, state = recorder.read[at - 1] if at else "", device.slots
    if path == "root.json":
        assert (state.committed, device.serving, state.quarantine) == (setting.old, setting.old, ())
        return
    assert (state.committed, device.serving, state.quarantine) == (setting.new, setting.new, ()), path


def loads(recorder, digest):
    """The number of each time that a model's file is opened."""
    return [n for n, path in enumerate(recorder.read, 1) if path == f"state/blobs/{digest}.onnx"]


def test_a_model_on_a_bad_sector_is_fetched_anew(setting, install_on_bad_sector):
    device, whole = install_on_bad_sector()
    check_healed(setting, device, whole, 0)
    part = whole.read.index(f"state/staging/{setting.new}.part") + 1
    committed, *_ = loads(whole, setting.old)
    verified, *_ = loads(whole, setting.new)
    assert committed < part < verified
    for at in (committed, part, verified):
        device, recorder = install_on_bad_sector(at)
        check_healed(setting, device, recorder, at)


def test_the_only_model_on_a_bad_sector_serves_again(setting, tmp_path):
    """The file that its download takes the place of is the only one there is."""
    home = tmp_path / "device"
    shutil.copytree(setting.home, home)
    device = Device(setting.bench.configure(home), setting.bench.clocks)
    recorder = Recorder(home)
    recorder.spoil(f"state/blobs/{setting.old}.onnx")
    with setting.bench.standing(), recorder.standing():
        device.boot()
        assert device.serving is None
        device.hear(setting.bench.offer(setting.old))
        device.turn_until(lambda _: device.serving == setting.old)
        state = device.slots
        assert (state.committed, state.trial, state.quarantine) == (setting.old, None, ())
        device.reboot()
        assert device.serving == setting.old
        device.power_off()


@pytest.mark.slow
def test_every_file_may_be_on_a_bad_sector(setting, install_on_bad_sector):
    _, whole = install_on_bad_sector()
    _, tried, *_ = loads(whole, setting.new)
    for at in range(1, whole.reads + 1):
        if at == tried:  # a candidate that cannot be loaded for its trial is refused, whatever the reason
            device, _ = install_on_bad_sector(at)
            assert (device.slots.committed, device.serving) == (setting.old, setting.old)
            continue
        device, recorder = install_on_bad_sector(at)
        check_healed(setting, device, recorder, at)
    print(f"{whole.reads} files were opened to be read")
    assert whole.reads > 20
