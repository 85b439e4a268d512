"""`skiffd --status`: the socket that answers, the client that asks, and the text a person reads."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.adapters import status_socket
from edge_runtime.adapters.status_report import (
    DeviceReport,
    LimitsReport,
    LinkReport,
    OutboxReport,
    Rows,
    render,
    to_document,
)
from edge_runtime.adapters.status_socket import NAME, StatusSocket, fallback_name, read_status
from edge_runtime.adapters.unix_socket import MAX_PATH_BYTES, abstract
from edge_runtime.contract.errors import ContractError, LinkError
from edge_runtime.contract.ids import digest, model_name
from edge_runtime.contract.messages import Health, ModelReport
from tests.support.device import cpu
from tests.support.disks import may_mount, read_only, tmpfs

A, B = digest("a" * 64), digest("b" * 64)


def report(**more: Any) -> DeviceReport:
    known: dict[str, Any] = {
        "version": "0.1.0",
        "fleet": "demo",
        "device": "dev-7",
        "cohort": "main",
        "session": "5e55104",
        "wall_ns": 1_795_000_000_000_000_000,
        "clock": "synced",
        **more,
    }
    return DeviceReport(**known)


FULL = report(
    models=(
        ModelReport(
            model=model_name("watch"),
            state="trial",
            serving=B,
            previous=A,
            candidate=B,
            rollout="r-3",
            revision=12,
            outcome="rolled_back",
            outcome_digest=A,
            reason="too slow",
        ),
    ),
    rows=Rows(answered=1200, failed=2, refused=(("shed", 5), ("width", 3)), labelled=100, correct=87),
    latency=cpu(1000, 30_000),
    queueing=cpu(1000, 2_000_000),
    window_age_seconds=75.0,
    health=Health(
        rss_bytes=61_000_000,
        peak_rss_bytes=80_000_000,
        cpu_ns=90_000_000_000,
        uptime_ns=9_000_000_000_000,
        pss_bytes=55_000_000,
        memory_limit_bytes=135_000_000,
        memory_pressure_ppm=12_500,
        minor_faults=700,
        major_faults=9,
        temperature_mc=61_234,
        throttled=2,
    ),
    limits=LimitsReport(
        rss_soft_bytes=50_000_000,
        rss_bytes=60_000_000,
        cpu_soft_ppm=500_000,
        temperature_soft_mc=80_000,
        on_hard="shed",
        over="hard",
        shedding=True,
        max_batch=64,
    ),
    outbox=OutboxReport(records=4, size_bytes=2600, max_bytes=8_000_000, merged=3, lost=1),
    link=LinkReport(broker="broker.local:8883", connected=False, since_seconds=3700.0, reason="timed out"),
    last_exit="out of memory (the kernel killed it; RSS was last seen at 122.3 MB, limit 135.0 MB)",
    restarts=2,
    starts=9,
)

TEXT = """\
device     dev-7 of fleet demo, cohort main
skiffd     0.1.0, session 5e55104
uptime     2 h 30 min
last exit  out of memory (the kernel killed it; RSS was last seen at 122.3 MB, limit 135.0 MB); \
2 starts in a row after no clean stop
model      watch: trial, serving bbbbbbbbbbbb
           candidate bbbbbbbbbbbb
           to fall back to: aaaaaaaaaaaa
           rollout r-3, revision 12
           last rollout rolled_back aaaaaaaaaaaa: too slow
rows       1200 answered, 2 failed, 5 refused (shed), 3 refused (width), 87.0% of 100 with a known truth correct
latency    p50 {p50}, p90 {p90}, p99 {p99} of 1000 rows in the open window (1 min 15 s)
queueing   p50 {q50}, p90 {q90}, p99 {q99} of 1000 rows in the open window (1 min 15 s)
memory     RSS 61.0 MB, peak 80.0 MB, PSS 55.0 MB, control group limit 135.0 MB
           pressure 1.25 %, 9 major faults, 700 minor
CPU        90.0 s, 1.00% of a core
heat       61.2 °C, slowed down since boot, not now
limits     RSS soft 50.0 MB, hard 60.0 MB, CPU soft 50.0 %, temperature soft 80.0 °C
           over the hard limit of memory; rows are answered with an error; at most 64 rows at once
outbox     4 waiting, 2.6 kB of 8.0 MB, 3 merged, 1 lost
link       not connected to broker.local:8883 for 1 h 1 min: timed out
clock      synced, 2026-11-18 11:06:40 UTC
"""


@contextmanager
def serving(path, document):
    server = StatusSocket(path, document)
    server.start()
    try:
        yield server
    finally:
        server.stop()


# ── the socket ─────────────────────────────────────────────────────────────────────────────────────────


def test_who_asks_is_told_every_time_anew(tmp_path):
    asked = iter(range(10))
    with serving(tmp_path / NAME, lambda: {"asked": next(asked)}):
        assert [read_status(tmp_path / NAME) for _ in range(3)] == [{"asked": i} for i in range(3)]


def test_only_the_owner_may_ask_and_the_socket_goes_with_the_daemon(tmp_path):
    with serving(tmp_path / NAME, dict):
        assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == []


def test_nobody_there_is_said_with_advice(tmp_path):
    with pytest.raises(LinkError, match=r"status.sock: nobody answers; is skiffd running with this config"):
        read_status(tmp_path / NAME)


def test_a_socket_left_by_a_killed_daemon_is_replaced(tmp_path, repository):
    path = tmp_path / NAME
    child = (
        "import os, sys; from pathlib import Path; from edge_runtime.adapters.status_socket import StatusSocket;"
        "StatusSocket(Path(sys.argv[1]), dict).start(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", child, str(path)], cwd=repository, check=False)
    assert done.returncode == -9
    assert path.is_socket()
    with pytest.raises(LinkError, match="nobody answers"):
        read_status(path)
    with serving(path, lambda: {"alive": True}):
        assert read_status(path) == {"alive": True}


def test_a_second_daemon_does_not_take_the_place_of_the_first(tmp_path):
    path = tmp_path / NAME
    with serving(path, lambda: {"first": True}):
        second = StatusSocket(path, dict)
        with pytest.raises(LinkError, match="another process listens there"):
            second.start()
        second.stop()
        assert read_status(path) == {"first": True}


def test_a_file_in_the_way_is_not_deleted(tmp_path):
    (tmp_path / NAME).write_text("precious")
    with pytest.raises(LinkError, match="something that is no socket"):
        StatusSocket(tmp_path / NAME, dict).start()
    assert (tmp_path / NAME).read_text() == "precious"


# ── where no file can be made ──────────────────────────────────────────────────────────────────────────


def absent(folder, stack):
    return folder / "absent" / NAME


def too_long(folder, stack):
    path = folder / ("x" * 100) / ("y" * 100) / NAME
    path.parent.mkdir(parents=True)
    return path


def read_only_and_empty(folder, stack):
    stack.enter_context(read_only(folder))
    return folder / NAME


def read_only_with_a_stale_one(folder, stack):
    with closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind(str(folder / NAME))
    stack.enter_context(read_only(folder))
    return folder / NAME


def full(folder, stack):
    stack.enter_context(tmpfs(folder))
    subprocess.run(
        ["mount", "-o", "remount,nr_inodes=1", str(folder)], check=True
    )  # ENOSPC for a second file
    return folder / NAME


OWN = os.geteuid()
needs_mount = pytest.mark.skipif(not may_mount(), reason="mounting file systems needs CAP_SYS_ADMIN")
obeys = pytest.mark.skipif(OWN == 0 and not may_mount(), reason="root may write anywhere, and not mount")
NO_PLACES = [
    absent,
    too_long,
    pytest.param(read_only_and_empty, marks=obeys),
    pytest.param(read_only_with_a_stale_one, marks=obeys),
    pytest.param(full, marks=needs_mount),
]


@pytest.mark.parametrize("place", NO_PLACES, ids=lambda place: place.__name__)
def test_where_no_file_can_be_made_the_status_is_found_all_the_same(tmp_path, place, caplog):
    with ExitStack() as stack:
        path = place(tmp_path, stack)
        with pytest.raises(LinkError, match="nobody answers; is skiffd running"):
            read_status(path)
        with serving(path, lambda: {"first": True}):
            assert f"status_elsewhere socket=@{fallback_name(path)} reason={path}: " in caplog.text
            assert read_status(path) == {"first": True}
            with pytest.raises(LinkError, match="another process listens there"):
                StatusSocket(path, dict).start()
            assert read_status(path) == {"first": True}
        with pytest.raises(LinkError, match="nobody answers; is skiffd running"):
            read_status(path)
        with serving(path, lambda: {"second": True}):
            assert read_status(path) == {"second": True}


def test_a_file_that_can_be_made_is_not_given_up_for_a_name(tmp_path, caplog):
    with serving(tmp_path / NAME, dict):
        assert (tmp_path / NAME).is_socket()
        with pytest.raises(ConnectionRefusedError), closing(socket.socket(socket.AF_UNIX)) as client:
            client.connect(abstract(fallback_name(tmp_path / NAME)))
    assert "status_elsewhere" not in caplog.text


def test_no_two_paths_share_a_name_and_every_name_fits(tmp_path):
    paths = [tmp_path / "a" / NAME, tmp_path / "b" / NAME, tmp_path / ("x" * 200) / NAME]
    names = {fallback_name(path) for path in paths}
    assert len(names) == 3
    assert all(len(abstract(name)) <= MAX_PATH_BYTES for name in names)
    assert fallback_name(paths[0]) == fallback_name(tmp_path / "a" / NAME)


@pytest.mark.parametrize(
    ("daemon", "asks", "folder", "answer"),
    [
        (OWN, OWN, OWN, None),
        (1001, 0, 1001, None),  # systemd's dynamic user owns its state folder
        (1001, 1001, 0, None),
        (0, 1001, 0, PermissionError),
        (1001, 1002, 1001, PermissionError),
        (1001, 0, 0, LinkError),  # whoever it is could be anybody
        (1001, 1002, 0, LinkError),
    ],
)
def test_who_answers_under_a_bare_name_is_looked_at(tmp_path, monkeypatch, daemon, asks, folder, answer):
    path = tmp_path / "absent" / NAME
    monkeypatch.setattr(os, "geteuid", lambda: asks)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: SimpleNamespace(st_uid=folder))
    if answer is None:
        status_socket._look_who_answers(daemon, path)
        return
    with pytest.raises(answer):
        status_socket._look_who_answers(daemon, path)


NOBODY = 65534
needs_root = pytest.mark.skipif(OWN != 0, reason="only root may become somebody else")


def from_here(code, repository):
    return f"import os, sys; sys.path.insert(0, {str(repository)!r}); from pathlib import Path;" + code


def as_nobody(code, *arguments, repository):
    """Runs ``code`` as another user, who may read the repository; its output."""
    done = subprocess.run(
        [sys.executable, "-c", from_here(code, repository), *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


ASK = """
from edge_runtime.adapters.status_socket import read_status
from edge_runtime.contract.errors import SkiffError
os.setuid(65534)
try:
    print(read_status(Path(sys.argv[1])))
except SkiffError as e:
    print(e)
"""
ASK_WITHOUT_LOOKING = """
import socket
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as client:
    client.connect("\\0" + sys.argv[1])
    print(client.recv(1000))
"""


@needs_root
def test_another_user_is_told_nothing_under_a_bare_name(tmp_path, repository, caplog):
    path = tmp_path / "absent" / NAME
    caplog.set_level("INFO")
    with serving(path, lambda: {"secret": True}):
        assert "not yours to read" in as_nobody(ASK, path, repository=repository)
        assert as_nobody(ASK_WITHOUT_LOOKING, fallback_name(path), repository=repository) == "b''"
        assert f"status_refused uid={NOBODY}" in caplog.text
        assert read_status(path) == {"secret": True}


TAKE = """
from edge_runtime.adapters.status_socket import StatusSocket
os.setuid(65534)
server = StatusSocket(Path(sys.argv[1]), lambda: {"lie": True})
server.start()
print("ready", flush=True)
sys.stdin.read()
server.stop()
"""


@needs_root
def test_a_stranger_who_takes_the_name_is_not_believed(tmp_path, repository):
    path = tmp_path / "absent" / NAME
    with subprocess.Popen(
        [sys.executable, "-c", from_here(TAKE, repository), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as stranger:
        assert stranger.stdout is not None
        assert stranger.stdin is not None
        assert stranger.stdout.readline() == "ready\n"
        with pytest.raises(
            LinkError, match="the user with the number 65534 answers for it, who is neither root"
        ):
            read_status(path)
        path.parent.mkdir()
        os.chown(path.parent, NOBODY, NOBODY)
        assert read_status(path) == {"lie": True}, "whose folder it is may say what it likes there"
        stranger.stdin.close()
    assert stranger.returncode == 0


# ── clients ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_client_that_does_not_read_holds_up_nobody_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(status_socket, "CLIENT_SECONDS", 0.2)
    path = tmp_path / NAME
    large = {"filler": "x" * 900_000}  # more than a socket buffers
    with serving(path, lambda: large), closing(socket.socket(socket.AF_UNIX)) as stuck:
        stuck.connect(str(path))
        started = time.monotonic()
        assert read_status(path, timeout=10.0) == large
        assert time.monotonic() - started < 5.0


def test_a_client_waits_in_a_line_that_is_full(tmp_path):
    path = tmp_path / NAME
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))
        listener.listen(0)
        with closing(socket.socket(socket.AF_UNIX)) as first:
            first.connect(str(path))  # takes the only place; nobody accepts
            with pytest.raises(LinkError, match=r"did not answer within 0\.1 s"):
                read_status(path, timeout=0.1)
            with pytest.raises(LinkError, match="another process listens there"):
                StatusSocket(path, dict).start()


def test_a_client_that_goes_away_does_not_end_the_service(tmp_path):
    path = tmp_path / NAME
    with serving(path, lambda: {"filler": "x" * 900_000}):
        for _ in range(20):
            with closing(socket.socket(socket.AF_UNIX)) as client:
                client.connect(str(path))
        assert "filler" in read_status(path, timeout=10.0)


def test_a_report_that_cannot_be_made_is_said_and_the_next_one_is_made(tmp_path, caplog):
    answers = [lambda: 1 / 0, lambda: {"bad": float("nan")}, lambda: {"bad": object()}, dict]
    path = tmp_path / NAME

    def document():
        return answers.pop(0)()

    with serving(path, document):
        for error in ("ZeroDivisionError", "ValueError", "TypeError"):
            with pytest.raises(ContractError, match=f"skiffd runs, but cannot report: {error}"):
                read_status(path)
        assert read_status(path) == {}
    assert caplog.text.count("status_broken") == 3


def test_stopping_waits_for_nobody_and_may_be_repeated(tmp_path):
    server = StatusSocket(tmp_path / NAME, dict)
    server.stop()
    server.start()
    threads = [t for t in threading.enumerate() if t.name == "status"]
    started = time.monotonic()
    server.stop()
    server.stop()
    assert time.monotonic() - started < 1.0
    assert not any(t.is_alive() for t in threads)


@contextmanager
def answering(path, data, *, close=True):
    """Something else that listens there."""
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))
        listener.listen()
        held = []

        def serve():
            client, _ = listener.accept()
            held.append(client)
            with suppress(BrokenPipeError):  # the asker had enough
                client.sendall(data)
            if close:
                client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()
        for client in held:
            client.close()


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[1]", b"[" * 100_000])
def test_an_answer_that_is_no_document_is_refused(tmp_path, data):
    with answering(tmp_path / NAME, data), pytest.raises(ContractError, match="not a status document"):
        read_status(tmp_path / NAME)


def test_an_endless_answer_is_cut_off(tmp_path):
    with (
        answering(tmp_path / NAME, b" " * (3 << 20)),
        pytest.raises(ContractError, match="sends more than 1048576 bytes"),
    ):
        read_status(tmp_path / NAME, timeout=10.0)


def test_an_answer_that_never_ends_is_not_waited_for(tmp_path):
    with (
        answering(tmp_path / NAME, b"{", close=False),
        pytest.raises(LinkError, match=r"skiffd did not answer within 0\.2 s"),
    ):
        read_status(tmp_path / NAME, timeout=0.2)


# ── the report ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_report_becomes_text(tmp_path):
    with serving(tmp_path / NAME, lambda: to_document(FULL)):
        document = read_status(tmp_path / NAME)
    assert document == json.loads(json.dumps(to_document(FULL)))
    quantiles = {f"p{q}": f"{FULL.latency.quantile_ns(q / 100) / 1e3:.1f} us" for q in (50, 90, 99)}
    quantiles |= {f"q{q}": f"{FULL.queueing.quantile_ns(q / 100) / 1e6:.1f} ms" for q in (50, 90, 99)}
    assert render(document) == TEXT.format(**quantiles)


def test_a_device_that_has_done_nothing_yet_has_a_text():
    text = render(to_document(report()))
    assert "latency    none\n" in text
    assert "limits     none\n" in text
    assert "heat       no sensor, not slowed down\n" in text
    assert "last exit  unknown\n" in text


def test_escapes_that_a_peer_sent_do_not_reach_the_terminal():
    text = render(to_document(report(last_exit="failed: \x1b[2J\u202eevil\nclock      synced")))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert len(text.splitlines()) == len(render(to_document(report())).splitlines())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(changes=st.dictionaries(st.sampled_from(sorted(to_document(FULL))), JSON), gone=st.integers(0, 19))
def test_any_document_has_a_text(changes, gone):
    document = {**to_document(FULL), **changes}
    document.pop(sorted(document)[gone % len(document)])
    assert render(document).startswith("device ")
    assert render(changes).startswith("device ")
