"""What the device reads from its disk, its child and its operator, under hostile bytes: a value or a refusal."""

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.adapters.outbox import Outbox
from edge_runtime.adapters.slots import Slots
from edge_runtime.adapters.sources.replay import ReplaySource
from edge_runtime.config import load
from edge_runtime.contract.errors import ConfigError, ContractError, SkiffError
from edge_runtime.contract.ids import ModelName, SessionId
from edge_runtime.core import events, lifecycle
from tests.support.device import MODEL, A, B

CONFIG = b"""
[device]
id = "d1"
fleet = "f"
state_dir = "state"
[broker]
port = 1883
[model]
name = "m"
trust_root = "root.json"
"""
SESSION = SessionId("0" * 16)


def replayed() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, features=np.zeros((4, 3), np.float32), labels=np.array(["a", "b", "a", "b"]))
    return stream.getvalue()


def recorded() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        state = lifecycle.SlotState(model=MODEL, committed=A, previous=B)
        Slots(Path(folder)).write_record(lifecycle.to_document(state))
        return (Path(folder) / "record.a.json").read_bytes()


def kept() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        outbox = Outbox(Path(folder) / "outbox.db")
        for seq in range(3):
            outbox.append(SESSION, seq, "a/window", bytes(200))
        outbox.close()
        return (Path(folder) / "outbox.db").read_bytes()


def read_config(data: bytes, folder: Path) -> None:
    path = folder / "skiffd.toml"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        load(path)


def read_replay(data: bytes, folder: Path) -> None:
    path = folder / "rows.npz"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        ReplaySource(path, rows_per_second=1.0)


def read_record(data: bytes, folder: Path) -> None:
    """A damaged copy is no record; a whole one may still hold nonsense, which is refused by name."""
    (folder / "state").mkdir(exist_ok=True)
    (folder / "state" / "record.a.json").write_bytes(data)
    slots = Slots(folder / "state")
    document = slots.record()
    assert document is not None or slots.damage
    if document is not None:
        with contextlib.suppress(ContractError):
            lifecycle.from_document(document, ModelName("watch"))


def read_outbox(data: bytes, folder: Path) -> None:
    """Whatever is found, records can be kept afterwards, there or beside it."""
    shutil.rmtree(folder / "box", ignore_errors=True)
    (folder / "box").mkdir()
    path = folder / "box" / "outbox.db"
    path.write_bytes(data)
    outbox = Outbox(path)
    try:
        outbox.append(SESSION, 99, "a/event", b"after")
        outbox.mark_sent([(record.session, record.seq) for record in outbox.pending(5)])
        assert any(record.payload == b"after" for record in outbox.pending(1000))
    except SkiffError:
        # A key that the damaged file holds with other content; nothing else may be refused.
        assert any(record.seq == 99 for record in outbox.pending(1000))
    finally:
        outbox.close()


def read_child(data: bytes, _: Path) -> None:
    try:
        line = json.loads(data)
    except (ValueError, RecursionError):
        return
    for read in (events.update_phase, events.update_ended):
        with contextlib.suppress(ContractError):
            read(line)


CHILD = json.dumps(
    {
        "ok": False,
        "stage": "fetch",
        "reason": "no network",
        "retry": True,
        "digest": A,
        "progress": "fetching",
    }
).encode()
READERS: dict[str, tuple[Callable[[bytes, Path], None], bytes]] = {
    "configuration": (read_config, CONFIG),
    "replay": (read_replay, replayed()),
    "slots": (read_record, recorded()),
    "outbox": (read_outbox, kept()),
    "update child": (read_child, CHILD),
}


@st.composite
def damaged(draw, whole: bytes):
    """The real thing with some bytes changed, cut out or put in; or something else altogether."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([0, 1, 2, 16, 600]))
        data[at : at + length] = draw(st.binary(max_size=12))
    return draw(st.one_of(st.just(bytes(data)), st.binary(max_size=200)))


def check(name, data, folder):
    read, _ = READERS[name]
    read(data.draw(damaged(READERS[name][1])), folder)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_hostile_bytes_are_read_or_refused(name, data, tmp_path):
    check(name, data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@settings(
    max_examples=3000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_many_hostile_bytes_are_read_or_refused(name, data, tmp_path):
    check(name, data, tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_the_whole_thing_is_read(name, tmp_path):
    read, whole = READERS[name]
    read(whole, tmp_path)
