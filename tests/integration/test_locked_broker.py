"""What a real Mosquitto lets whom do, with the files of `skiff broker-config` and certificates of `trainer.authority`.

MQTT 3.1.1 has no word for "refused": a publish is acknowledged and dropped, a subscription granted and never served.
So every refusal is observed at the other end, by a fence: a message sent afterwards that does arrive.
"""

import inspect
import itertools
import socket
import ssl
import threading
import typing
from datetime import UTC, datetime, timedelta

import pytest
from paho.mqtt.client import topic_matches_sub
from paho.mqtt.enums import MQTTProtocolVersion

from cli.broker_config import AGGREGATOR, COORDINATOR
from edge_runtime.contract.ids import DeviceId, Digest
from edge_runtime.contract.topics import Topics
from tests.services import find_mosquitto, missing_service
from tests.support.locked import FLEET, Enrolled, Peer, Wallet, locked_broker
from trainer.authority import SERVICES

pytestmark = pytest.mark.broker

T = Topics(FLEET)
ME, OTHER = DeviceId("pump-17"), DeviceId("pump-18")
OWNER, DEVICE = "the device of the topic", "any device"

RIGHTS: dict[str, tuple[set[str], set[str]]] = {
    "status": ({OWNER}, {"aggregator"}),
    "window": ({OWNER}, {"aggregator"}),
    "event": ({OWNER}, {"aggregator"}),
    "labels": ({"labeller"}, {"aggregator"}),
    "labels_ack": ({"aggregator"}, {"labeller"}),
    "ack": ({"aggregator"}, {OWNER}),
    "command": ({"coordinator"}, {OWNER}),
    "alarm": ({"aggregator"}, set()),
    "release": ({"coordinator"}, {DEVICE}),
    "trust": ({"publisher"}, {DEVICE}),
    "packed_trust": ({"publisher"}, {DEVICE}),
    "chunk": ({"publisher"}, {DEVICE}),
}
"""Who may write and who may read each family of topics. The observer reads all of them and writes none."""
FILTERS = {"every", "sender", "source"}
"""Methods of `Topics` that name no topic: a filter, and two that read one."""
COUNT = itertools.count()


def families():
    return {name for name, _ in inspect.getmembers(Topics, inspect.isfunction) if name[0] != "_"} - FILTERS


def topic(family, device):
    """The topic of ``family``, of ``device`` where it belongs to one."""
    examples = {"int": 3, "Digest": Digest("0" * 64), "DeviceId": device}
    method = getattr(T, family)
    hints = {name: hint for name, hint in typing.get_type_hints(method).items() if name != "return"}
    return method(**{name: examples.get(hint.__name__, "example") for name, hint in hints.items()})


def is_a_devices(family):
    return topic(family, ME) != topic(family, OTHER)


def allowed(right, who, family, owner):
    """Whether ``who``, a service or `ME`, is among the ``right`` ones for a topic of ``owner``."""
    if who == ME:
        return DEVICE in right or (OWNER in right and owner == ME)
    return who in right or (who == "observer" and right is RIGHTS[family][1]) or DEVICE in right


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    binary = find_mosquitto()
    if binary is None:
        missing_service("mosquitto is not installed (Debian: apt-get install mosquitto)")
    with locked_broker(binary, tmp_path_factory.mktemp("locked")) as (enrolled, broker):
        yield enrolled, broker


@pytest.fixture(scope="module")
def peers(fleet):
    """Everyone who is somebody, connected: two devices and each service."""
    enrolled, broker = fleet
    wallets: dict[str, Wallet] = {name: enrolled.device(name) for name in (ME, OTHER)}
    wallets |= {which: enrolled.service(which) for which in SERVICES}
    found = {name: Peer(broker, wallet, client_id=name) for name, wallet in wallets.items()}
    for peer in found.values():
        peer.__enter__()
    found["observer"].subscribe(f"skiff/1/{FLEET}/#")
    yield found
    for peer in found.values():
        peer.__exit__()


@pytest.fixture
def observer(peers):
    return peers["observer"]


def unique():
    return b"%d" % next(COUNT)


def fence(peers):
    """What has reached the observer by now."""
    mark = unique()
    peers["aggregator"].publish(T.alarm(), mark)
    return peers["observer"].until(mark)


def writer(peers, family, owner):
    """Somebody who may write ``family``, as the table says."""
    [who] = RIGHTS[family][0]
    return peers[owner if who == OWNER else who]


def test_every_family_of_topics_is_classified():
    assert set(RIGHTS) == families()


CASES = [
    (family, owner) for family in sorted(RIGHTS) for owner in ((ME, OTHER) if is_a_devices(family) else (ME,))
]
WHO = [ME, *SERVICES]


@pytest.mark.attack("A71")
@pytest.mark.parametrize(("family", "owner"), CASES)
def test_who_may_write_a_topic(peers, family, owner):
    place = topic(family, owner)
    for who in WHO:
        sent = unique()
        peers[who].publish(place, sent)
        got = fence(peers)
        assert got == ([(place, sent)] if allowed(RIGHTS[family][0], who, family, owner) else []), who


@pytest.mark.attack("A72")
@pytest.mark.parametrize(("family", "owner"), CASES)
@pytest.mark.parametrize("retained", [False, True])
def test_who_may_read_a_topic(peers, family, owner, retained):
    place, sent, known, mark = topic(family, owner), unique(), T.trust(7), unique()
    source = writer(peers, family, owner)
    if retained:
        source.publish(place, sent, retain=True)
    for who in WHO:
        if who != "observer":  # has subscribed to everything
            peers[who].subscribe(place, known)
    if not retained:
        source.publish(place, sent)
    peers["publisher"].publish(known, mark)  # what everyone may read ends the wait
    for who in WHO:
        expected = allowed(RIGHTS[family][1], who, family, owner)
        assert peers[who].until(mark) == ([(place, sent)] if expected else []), who
        if who != "observer":
            peers[who].unsubscribe(place, known)
    if retained:
        source.publish(place, b"", retain=True)
    fence(peers)


@pytest.mark.parametrize("wide", ["#", "+/#", f"skiff/1/{FLEET}/#", f"skiff/1/{FLEET}/d/+/cmd", "$SYS/#"])
def test_a_wildcard_gives_a_device_no_more_than_its_own(fleet, peers, wide):
    enrolled, broker = fleet
    with Peer(broker, enrolled.device(ME), client_id="curious") as reader:
        reader.subscribe(wide, T.command(ME))
        for family, owner in CASES:
            writer(peers, family, owner).publish(topic(family, owner), b"secret")
        mark = unique()
        peers["coordinator"].publish(T.command(ME), mark)
        seen = {place for place, _ in reader.until(mark)}
    fence(peers)
    own = {topic(f, o) for f, o in CASES if allowed(RIGHTS[f][1], ME, f, o)}
    covered = {place for place in own if topic_matches_sub(wide, place) or place == T.command(ME)}
    assert seen == covered


def test_a_shared_subscription_gives_a_device_no_more_than_its_own(fleet, peers):
    enrolled, broker = fleet
    with Peer(broker, enrolled.device(ME), client_id="curious") as reader:
        reader.subscribe(T.every("window", share="thieves"), T.command(ME))
        peers[OTHER].publish(topic("window", OTHER), b"secret")
        mark = unique()
        peers["coordinator"].publish(T.command(ME), mark)
        assert reader.until(mark) == []
    fence(peers)


def test_an_aggregator_gets_its_share(fleet, peers):
    enrolled, broker = fleet
    with Peer(broker, enrolled.service("aggregator"), client_id="second") as reader:
        reader.subscribe(T.every("window", share="aggregators"))
        sent = unique()
        peers[OTHER].publish(topic("window", OTHER), sent)
        assert reader.until(sent) == []
    fence(peers)


def test_with_mqtt_5_the_broker_says_that_it_refused(fleet, observer):
    enrolled, broker = fleet
    with Peer(broker, enrolled.device(ME), client_id="five", version=MQTTProtocolVersion.MQTTv5) as peer:
        assert peer.publish(T.status(OTHER), b"x").getName() == "Not authorized"
        assert peer.publish(T.status(ME), b"x").getName() == "Success"
    assert observer.until(b"x") == []
    assert "Denied PUBLISH from five" in broker.log, "what test_locked_loop looks for"


def test_a_last_will_is_subject_to_the_same_rules(fleet, peers):
    enrolled, broker = fleet
    for place, sent in ((T.status(OTHER), b"forged"), (T.status(ME), b"honest")):
        with Peer(broker, enrolled.device(ME), client_id="dying", will=(place, sent)) as peer:
            peer.cut()
    assert [m for m in peers["observer"].until(b"honest") if m[1] == b"forged"] == []


# ── who one is ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("username", [COORDINATOR, AGGREGATOR, OTHER, "+", "#", "root"])
def test_the_certificate_says_who_one_is_whatever_the_user_name(fleet, peers, username):
    enrolled, broker = fleet
    with Peer(broker, enrolled.device(ME), client_id="impostor", username=username) as peer:
        for place in (T.status(OTHER), topic("release", ME), T.ack(ME)):
            peer.publish(place, b"forged")
        own = unique()
        peer.publish(T.status(ME), own)
    assert fence(peers) == [(T.status(ME), own)]


@pytest.mark.parametrize("client_id", ["+", "#", "+/#", "a/b", COORDINATOR, f"{OTHER}-update", "$SYS"])
def test_a_client_id_gives_no_rights(fleet, peers, client_id):
    enrolled, broker = fleet
    try:
        with Peer(broker, enrolled.device(ME), client_id=client_id) as peer:
            peer.subscribe(T.command(OTHER))
            peer.publish(T.status(OTHER), b"forged")
            peers["coordinator"].publish(T.command(OTHER), b"secret")
            mark = unique()
            peer.subscribe(T.command(ME))
            peers["coordinator"].publish(T.command(ME), mark)
            if client_id not in {"+", "#", "+/#"}:  # these may not even do what is their own (CVE-2017-7650)
                assert peer.until(mark) == []
            assert peer.messages.empty()
    finally:
        got = fence(peers)
    assert (T.status(OTHER), b"forged") not in got
    assert (T.command(OTHER), b"secret") in got


@pytest.mark.attack("A73")
@pytest.mark.parametrize("queued", [False, True])
def test_taking_over_anothers_session_gives_nothing_of_it(fleet, peers, queued):
    enrolled, broker = fleet
    name, place = f"victim-{queued}", T.command(OTHER)
    victim = Peer(broker, enrolled.device(OTHER), client_id=name, clean=False)
    with victim:
        victim.subscribe(place)
        if not queued:
            thief = Peer(broker, enrolled.device(ME), client_id=name, clean=False)
            with thief:
                assert victim.closed.get(timeout=5)
                assert steals(peers, thief, place) == []
    if queued:
        peers["coordinator"].publish(place, b"secret")
        with Peer(broker, enrolled.device(ME), client_id=name, clean=False) as thief:
            assert steals(peers, thief, place) == []
    fence(peers)


def steals(peers, thief, place):
    peers["coordinator"].publish(place, b"secret")
    thief.subscribe(T.command(ME))
    mark = unique()
    peers["coordinator"].publish(T.command(ME), mark)
    return thief.until(mark)


@pytest.mark.attack("A77")
@pytest.mark.parametrize("name", ["+", "#", f"{OTHER}/x", "", "Pump-17"])
def test_odd_names_that_only_the_authoritys_key_can_make_have_no_rights(fleet, peers, name):
    enrolled, broker = fleet
    wallet = enrolled.forged(name) if name else enrolled.forged(" ")
    with Peer(broker, wallet, client_id="odd") as peer:
        for family, owner in CASES:
            peer.publish(topic(family, owner), b"forged")
    assert fence(peers) == []


# ── who is let in at all ───────────────────────────────────────────────────────────────────────────────


def refused(broker, wallet):
    """Whether the broker ends the handshake: with TLS 1.3 the client learns of it with its first read."""
    with pytest.raises((ConnectionResetError, ssl.SSLError)), Peer(broker, wallet, client_id="stranger"):
        pass
    return True


def past(days):
    return datetime.now(UTC) - timedelta(days=days)


def foreign(enrolled, folder):
    """A device of that very name, enrolled by a stranger; it knows our authority's certificate."""
    wallet = Enrolled(folder, FLEET).device(ME)
    return Wallet(str(enrolled.authority.certificate), wallet.certificate, wallet.key)


STRANGERS = {
    "no certificate": lambda enrolled, folder: enrolled.nobody(),
    "an expired one": lambda enrolled, folder: enrolled.forged(ME, start=past(9), end=past(1)),
    "one of tomorrow": lambda enrolled, folder: enrolled.forged(ME, start=past(-1), end=past(-9)),
    "the broker's kind": lambda enrolled, folder: enrolled.forged(ME, use="server"),
    "another authority": foreign,
    "another authority of the same name": lambda enrolled, folder: foreign(enrolled, folder / "same"),
}


@pytest.mark.attack("A74")
@pytest.mark.parametrize("which", STRANGERS)
def test_who_is_not_enrolled_is_not_let_in(fleet, peers, tmp_path, which):
    enrolled, broker = fleet
    assert refused(broker, STRANGERS[which](enrolled, tmp_path))
    with Peer(broker, enrolled.device(ME), client_id="known") as peer:  # not for another reason
        peer.publish(T.status(ME), b"x")
    assert fence(peers) == [(T.status(ME), b"x")]


@pytest.mark.attack("A75")
def test_a_device_does_not_take_another_device_for_the_broker(fleet):
    """Python's TLS, which skiffd uses: a client's certificate is no server's, even with the broker's address in it."""
    enrolled, broker = fleet
    for use, problem in (("client", "unsuitable certificate purpose"), ("server", "")):
        wallet = enrolled.forged(OTHER, use=use, hosts=(broker.host,))
        assert handshake(wallet, enrolled.device(ME), broker.host) == problem, use


def handshake(server, client, host):
    """What ``client`` has against ``server``; empty when nothing."""
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inside.load_cert_chain(server.certificate, server.key)
    outside = ssl.create_default_context(cafile=client.ca)
    near, far = socket.socketpair()

    def serve():
        try:
            inside.wrap_socket(far, server_side=True).close()
        except OSError:
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        outside.wrap_socket(near, server_hostname=host).close()
    except ssl.SSLCertVerificationError as e:
        return e.verify_message
    else:
        return ""
    finally:
        near.close()
        thread.join()


# ── revocation ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.attack("A76")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_revocation_counts_from_the_reload_on_for_open_connections_and_tls_tickets_too(fleet, peers, version):
    enrolled, broker = fleet
    name = f"lost-{version.name[-1]}"
    wallet = enrolled.device(name)
    context = ssl.create_default_context(cafile=wallet.ca)
    context.load_cert_chain(wallet.certificate, wallet.key)
    context.maximum_version = version

    def connect(session=None):
        plain = socket.create_connection((broker.host, broker.port), timeout=10)
        with context.wrap_socket(plain, server_hostname=broker.host, session=session) as secured:
            secured.sendall(
                b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01t"
            )  # CONNECT of MQTT 3.1.1, client id "t"
            if not secured.recv(4):
                raise ConnectionResetError
            return secured.session, secured.session_reused

    ticket, _ = connect()
    assert connect(ticket)[1], "tickets are honoured, or the rest of this test shows nothing"
    with Peer(broker, wallet, client_id=name) as open_one:
        open_one.subscribe(T.command(DeviceId(name)))
        enrolled.authority.revoke(name)
        open_one.publish(T.status(DeviceId(name)), b"before")
        assert fence(peers) == [(T.status(DeviceId(name)), b"before")]
        broker.configure()
        broker.reload()
        open_one.publish(T.status(DeviceId(name)), b"after")
        peers["coordinator"].publish(T.command(DeviceId(name)), b"order")
        assert fence(peers) == [(T.command(DeviceId(name)), b"order")]
        assert open_one.messages.empty()
    with pytest.raises(OSError):
        connect(ticket)
    assert refused(broker, wallet)
    with Peer(broker, enrolled.device(ME), client_id="known"):
        pass


def test_one_revoked_certificate_leaves_the_devices_newer_one(fleet, peers):
    """A connection that is open goes on, for the rules are by name: the page on enrolling says to restart."""
    enrolled, broker = fleet
    name = DeviceId("renewed")
    old = enrolled.device(name)
    [entry] = [e for e in enrolled.authority.entries() if e.name == name]
    new = enrolled.put(name, enrolled.authority.device(name, renew=True))
    with Peer(broker, new, client_id="new"), Peer(broker, old, client_id="old") as open_one:
        enrolled.authority.revoke(entry.serial)
        broker.configure()
        broker.reload()
        open_one.publish(T.status(name), b"still")
        assert fence(peers) == [(T.status(name), b"still")]
    assert refused(broker, old)
    with Peer(broker, new, client_id="new") as peer:
        peer.publish(T.status(name), b"x")
    assert fence(peers) == [(T.status(name), b"x")]
