"""The HTTPS carrier against a real server over TLS on the loopback address: an honest one, and hostile ones."""

import contextlib
import random
import socket
import threading
import time

import pytest

from edge_runtime.carriers import https as carrier
from edge_runtime.carriers.https import HttpsCarrier, Web
from edge_runtime.contract.errors import ContractError, LinkError
from edge_runtime.contract.ids import digest_of
from edge_runtime.contract.trust import Target, repository_url
from tests.services import HOST
from tests.support.certificates import Authority
from tests.support.web import Asked, WebServer, hang_up

DATA = random.Random(3).randbytes(300_000)
PATH = "models/toy/m.onnx"
TARGET = Target(digest=digest_of(DATA), path=PATH, length=len(DATA))
WHERE = f"/targets/{PATH}"
SECONDS = 10.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority):
    return authority.issue("web")


@pytest.fixture
def server(tmp_path, pair):
    path = tmp_path / "web" / "targets" / PATH
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    metadata = tmp_path / "web" / "metadata"
    metadata.mkdir()
    (metadata / "timestamp.json").write_bytes(b'{"a": 1}')
    with WebServer(tmp_path / "web", pair) as server:
        yield server


@pytest.fixture
def pauses():
    return []


@pytest.fixture
def way(server, authority, pauses):
    with HttpsCarrier(Web(url=server.url, ca=authority.path), sleep=pauses.append) as way:
        yield way


@pytest.fixture
def part(tmp_path):
    return tmp_path / "m.part"


def soon(seconds=SECONDS):
    return time.monotonic() + seconds


def fetch(way, part, seconds=SECONDS):
    way.blob(TARGET, part, soon(seconds))


def refused(way, part, reason, seconds=SECONDS):
    with pytest.raises(LinkError, match=reason):
        fetch(way, part, seconds)


# ── an honest server ───────────────────────────────────────────────────────────────────────────────────


def test_a_model_comes_in_one_stream(server, way, part):
    fetch(way, part)
    assert part.read_bytes() == DATA
    assert server.asked == [Asked(WHERE, None)]
    fetch(way, part)
    assert len(server.asked) == 1


def test_what_is_here_is_not_fetched_again(server, way, part):
    part.write_bytes(DATA[:123_457])
    fetch(way, part)
    assert part.read_bytes() == DATA
    assert server.asked == [Asked(WHERE, 123_457)]
    assert server.sent == len(DATA) - 123_457


def test_more_than_there_is_was_never_the_model(server, way, part):
    part.write_bytes(DATA + b"x")
    fetch(way, part)
    assert part.read_bytes() == DATA
    assert server.asked == [Asked(WHERE, None)]


def test_metadata_comes_file_by_file_over_one_connection(server, way, part):
    file = way.metadata(1, soon())
    assert not server.asked
    assert [file(name) for name in ("2.root.json", "timestamp.json", "3.root.json")] == [
        None,
        b'{"a": 1}',
        None,
    ]
    fetch(way, part)
    assert [asked.path for asked in server.asked][:2] == ["/metadata/2.root.json", "/metadata/timestamp.json"]
    assert server.visitors == 1


def test_a_folder_below_the_root_is_an_address_too(tmp_path, server, authority, part):
    (tmp_path / "web" / "fleet").mkdir()
    (tmp_path / "web" / "targets").rename(tmp_path / "web" / "fleet" / "targets")
    with HttpsCarrier(Web(url=f"{server.url}fleet", ca=authority.path)) as way:
        fetch(way, part)
    assert server.asked == [Asked(f"/fleet{WHERE}", None)]


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_bucket_says_in_several_ways_that_there_is_nothing(server, way, status):
    server.behave = lambda visit: visit.say(status, b"no")
    assert way.metadata(1, soon())("2.root.json") is None


# ── interruptions ──────────────────────────────────────────────────────────────────────────────────────


def breaking_after(*sizes):
    """Answers honestly, but hangs up after so many bytes of a body, answer by answer; then goes on to the end."""
    left = list(sizes)

    def behave(visit):
        if not left:
            visit.serve()
            return
        start, size = visit.asked.start or 0, left.pop(0)
        status = 206 if visit.asked.start is not None else 200
        part = f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
        visit.say(status, DATA[start : start + size], length=len(DATA) - start, Content_Range=part)
        visit.wfile.flush()
        hang_up(visit.connection)

    return behave


def test_a_broken_connection_is_gone_on_with_where_it_broke(server, way, part, pauses):
    server.behave = breaking_after(100_000, 0, 50_000)
    fetch(way, part)
    assert part.read_bytes() == DATA
    assert [asked.start for asked in server.asked] == [None, 100_000, 100_000, 150_000]
    assert server.sent == len(DATA)
    assert len(pauses) == 3


def test_a_server_that_breaks_every_time_is_left(server, way, part, pauses):
    server.behave = breaking_after(1000, *[0] * 10)
    refused(way, part, rf"1000 of {len(DATA)} bytes are here, {carrier.ATTEMPTS} times")
    assert len(server.asked) == carrier.ATTEMPTS
    assert part.read_bytes() == DATA[:1000]


def test_a_server_that_is_not_well_is_asked_again(server, way, part, pauses):
    unwell = [503, 500, 429]

    def behave(visit):
        visit.say(unwell.pop(), b"later") if unwell else visit.serve()

    server.behave = behave
    assert way.metadata(1, soon())("timestamp.json") == b'{"a": 1}'
    unwell += [503, 503]
    fetch(way, part)
    assert part.read_bytes() == DATA
    assert len(pauses) == 5
    server.behave = lambda visit: visit.say(503)
    refused(way, part.with_name("other"), "the server answered 503")


def test_a_server_without_ranges_sends_all_of_it(server, way, part):
    server.behave = lambda visit: visit.say(200, DATA)
    part.write_bytes(b"x" * 1000)
    fetch(way, part)
    assert part.read_bytes() == DATA


def test_parts_may_be_smaller_than_asked_for(server, way, part):
    def behave(visit):
        start = visit.asked.start
        if start is None:
            visit.say(200, DATA[:10], length=len(DATA))
        else:
            end = min(start + 99_999, len(DATA) - 1)
            visit.say(206, DATA[start : end + 1], Content_Range=f"bytes {start}-{end}/*")

    server.behave = behave
    fetch(way, part)
    assert part.read_bytes() == DATA
    assert [asked.start for asked in server.asked] == [None, 10, 100_010, 200_010]


@pytest.mark.parametrize("seed", range(8))
def test_wherever_it_is_cut_it_ends_whole_or_with_a_reason(tmp_path, seed, part):
    """Over http, which is quick: what is cut, answered and begun anew is the same."""
    rng = random.Random(seed)
    data = rng.randbytes(20_000)

    def behave(visit):
        start = visit.asked.start or 0
        size = rng.choice([0, 1, 4000, 9000, len(data)])
        if start and rng.random() < 0.7:
            visit.say(
                206,
                data[start : start + size],
                length=len(data) - start,
                Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}",
            )
        else:
            visit.say(200, data[:size], length=rng.choice([len(data), -1]))

    target = Target(digest=digest_of(data), path=PATH, length=len(data))
    with WebServer(tmp_path) as server, HttpsCarrier(Web(url=server.url), sleep=lambda _: None) as way:
        server.behave = behave
        with contextlib.suppress(LinkError):
            for _ in range(20):
                way.blob(target, part, soon())
        found = part.read_bytes() if part.exists() else b""
    assert found == data[: len(found)]
    assert server.sent <= (carrier.MAX_TIMES_OVER + 1) * len(data) * 20


# ── hostile servers ────────────────────────────────────────────────────────────────────────────────────


def ranged(text):
    return lambda visit: visit.say(206, DATA[500:], Content_Range=text)


LIES = {
    "another beginning": (ranged(f"bytes 0-{len(DATA) - 1}/{len(DATA)}"), "asked for bytes 1000-"),
    "another length": (ranged(f"bytes 1000-{len(DATA) - 1}/{len(DATA) + 1}"), "the server answered with"),
    "beyond the end": (ranged(f"bytes 1000-{len(DATA)}/{len(DATA)}"), "the server answered with"),
    "backwards": (ranged(f"bytes 1000-999/{len(DATA)}"), "the server answered with"),
    "no range": (ranged("\x1b[2J"), r"the server answered with '\?\[2J'"),
    "too long": (
        lambda visit: visit.say(200, DATA, length=len(DATA) + 1),
        "300001 bytes instead of the 300000",
    ),
    "too short": (
        lambda visit: visit.say(200, DATA[:-1]),
        "299999 bytes instead of the 300000 that are signed",
    ),
    "nothing left": (lambda visit: visit.say(416), "holds fewer than the 300000 bytes"),
    "absent": (lambda visit: visit.say(404), "copy the repository's metadata/ and targets/ there"),
    "no content": (lambda visit: visit.say(204), "the server answered 204"),
    "squeezed": (lambda visit: visit.say(200, DATA, Content_Encoding="gzip"), "came as 'gzip'"),
}


@pytest.mark.attack("A10")
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_ends_the_fetch_at_once_and_what_was_here_stays(server, way, part, pauses, lie):
    server.behave, reason = LIES[lie]
    part.write_bytes(DATA[:1000])
    refused(way, part, reason)
    assert len(server.asked) == 1
    assert part.read_bytes() == DATA[:1000]
    assert not pauses


def test_a_part_that_nobody_asked_for_is_refused(server, way, part):
    server.behave = ranged(f"bytes 0-{len(DATA) - 1}/{len(DATA)}")
    refused(way, part, "the server answered 206")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(tmp_path, server, way, part, status):
    with WebServer(tmp_path / "web") as elsewhere:
        server.behave = lambda visit: visit.say(status, Location=f"{elsewhere.url}targets/{PATH}")
        refused(way, part, rf"redirects are not followed, and this one leads to '{elsewhere.url}")
        with pytest.raises(LinkError, match="redirects"):
            way.metadata(1, soon())("timestamp.json")
        assert not elsewhere.visitors


def endless_chunks(visit):
    visit.say(200, length=-1, Transfer_Encoding="chunked")
    visit.endless(b"8000\r\n" + b"x" * 0x8000 + b"\r\n")


def endless_stream(visit):
    visit.say(200, length=-1)
    visit.endless(b"x" * 0x8000)


@pytest.mark.attack("A08")
@pytest.mark.parametrize("endless", [endless_chunks, endless_stream])
def test_endless_data_is_cut_off_at_the_signed_length(server, way, part, endless):
    server.behave = endless
    fetch(way, part)
    assert part.stat().st_size == len(DATA)
    with pytest.raises(LinkError, match=f"larger than the {carrier.MAX_METADATA_BYTES} bytes allowed"):
        way.metadata(1, soon())("timestamp.json")


def test_metadata_that_says_it_is_too_large_is_not_read(server, way):
    server.behave = lambda visit: visit.say(200, length=carrier.MAX_METADATA_BYTES + 1)
    with pytest.raises(LinkError, match="larger than"):
        way.metadata(1, soon())("timestamp.json")


def test_a_server_that_begins_again_and_again_is_left(server, way, part):
    def behave(visit):
        visit.say(200, DATA[: 80_000 + 10_000 * len(server.asked)], length=-1)

    server.behave = behave
    refused(way, part, "have the server answer range requests")
    assert server.sent <= (carrier.MAX_TIMES_OVER + 1) * len(DATA)


def slow_body(visit):
    visit.say(200, length=len(visit.data))
    visit.drip(visit.data, 0.1)


def slow_headers(visit):
    visit.drip(b"HTTP/1.1 200 " + b"x" * 10_000, 0.02)


def slow_trailers(visit):
    visit.say(200, length=-1, Transfer_Encoding="chunked")
    visit.write(b"0\r\n")
    visit.drip(b"a: b\r\n" * 10_000, 0.02)


def silence(visit):
    visit.server.closing.wait(SECONDS)


@pytest.mark.attack("A09")
@pytest.mark.parametrize("slow", [slow_body, slow_headers, slow_trailers, silence])
def test_slow_data_ends_at_the_deadline(server, way, part, slow):
    server.behave = slow
    start = time.monotonic()
    refused(way, part, "the deadline passed", seconds=0.15)
    assert time.monotonic() - start < 3.0
    with pytest.raises(LinkError, match="the deadline passed"):
        way.metadata(1, soon(0.15))("timestamp.json")


def test_who_accepts_and_says_nothing_is_left_at_the_deadline(part, authority):
    with socket.create_server((HOST, 0)) as mute:
        url = f"https://{HOST}:{mute.getsockname()[1]}/"
        with HttpsCarrier(Web(url=url, ca=authority.path)) as way:
            refused(way, part, "the deadline passed", seconds=0.15)


def test_nobody_there_is_a_reason(part, authority):
    with socket.create_server((HOST, 0)) as gone:
        url = f"https://{HOST}:{gone.getsockname()[1]}/"
    with HttpsCarrier(Web(url=url, ca=authority.path), sleep=lambda _: None) as way:
        refused(way, part, "Connection refused")


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"\0" * 100,
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"x" * 70_000,
    ],
)
def test_noise_is_no_answer(tmp_path, part, noise):
    def behave(visit):
        visit.write(noise)

    with WebServer(tmp_path) as server, HttpsCarrier(Web(url=server.url), sleep=lambda _: None) as way:
        server.behave = behave
        refused(way, part, f"{carrier.ATTEMPTS} times")


def test_no_watchdog_outlives_an_answer(server, way, part):
    fetch(way, part, seconds=600.0)
    server.behave = lambda visit: visit.say(404)
    refused(way, part.with_name("other"), "is not there", seconds=600.0)
    watchdogs = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for watchdog in watchdogs:
        watchdog.join(SECONDS)
    assert not [watchdog for watchdog in watchdogs if watchdog.is_alive()]


# ── who it is ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_server_of_another_authority_is_told_nothing(tmp_path, server, part):
    stranger = Authority(tmp_path / "stranger")
    with HttpsCarrier(Web(url=server.url, ca=stranger.path), sleep=lambda _: None) as way:
        refused(way, part, "its certificate is not trusted")
    assert not server.asked


def test_a_server_may_ask_for_the_devices_certificate(tmp_path, server, authority, pair, part):
    device = authority.issue("d")
    with WebServer(tmp_path / "web", pair, client_ca=authority.path) as strict:
        with HttpsCarrier(Web(url=strict.url, ca=authority.path), sleep=lambda _: None) as way:
            refused(way, part, f"{carrier.ATTEMPTS} times")
        web = Web(url=strict.url, ca=authority.path, certificate=device.certificate, key=device.key)
        with HttpsCarrier(web) as way:
            fetch(way, part)
    assert part.read_bytes() == DATA


def test_tls_files_that_cannot_be_used_are_named(tmp_path, server, part):
    with HttpsCarrier(Web(url=server.url, ca=str(tmp_path / "none.pem"))) as way:
        refused(way, part, "cannot use the TLS files .*none.pem")


@pytest.mark.parametrize(
    "url",
    [
        *("", "https://a.example", "https://a.example:8443/b/c/", "https://[::1]/x", "https://10.0.0.1/"),
        *("http://localhost:80/", "http://127.0.0.1:1234/a", "http://[::1]/"),
    ],
)
def test_addresses_of_repositories(url):
    assert repository_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://a.example/",
            "ftp://a/",
            "https://",
            "a.example",
            "https://user:secret@a.example/",
            None,
            3,
        ),
        *(
            "https://a/?b",
            "https://a/#b",
            "https://a/b c",
            "http://localhost.evil/",
            "http://127.0.0.1.evil/",
        ),
        *("https://a/\n", "https://a/%2e%2e/", "https://a:999999/"),
    ],
)
def test_what_is_no_address_of_a_repository(url):
    with pytest.raises(ContractError, match="is not the address of a repository"):
        repository_url(url)
