"""A fleet's certificate authority: who gets which certificate, what is refused, crashes at every write."""

import itertools
import json
import random
import shutil
import ssl
import stat
import subprocess
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_runtime.contract import ids
from tests.services import missing_service
from trainer import certificates, files
from trainer.authority import RESERVED, SERVICES, Authority, EnrolError

FLEET = ids.fleet_id("demo")
NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "authority", FLEET, clock=lambda: NOW)


def parsed(issued):
    return x509.load_pem_x509_certificate(issued.certificate)


def revoked_serials(data):
    return {entry.serial_number for entry in x509.load_pem_x509_crl(data)}


def list_number(data):
    return x509.load_pem_x509_crl(data).extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def request(tmp_path, name="pump-17", *, key=None, subject=None, extensions=()):
    """A certificate request as a device would make it, as a file."""
    key = key or certificates.new_key()
    if subject is None:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    path = tmp_path / f"{name}.csr"
    path.write_bytes(builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM))
    return path


# ── what a certificate says ────────────────────────────────────────────────────────────────────────────


def test_a_devices_certificate_is_for_clients_only_and_carries_its_id(authority):
    found = parsed(authority.device("pump-17", days=30))
    assert found.subject.rfc4514_string() == "CN=pump-17"
    extensions = found.extensions
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    assert extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    with pytest.raises(x509.ExtensionNotFound):
        extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert found.not_valid_after_utc == NOW + timedelta(days=30)
    assert found.not_valid_before_utc == NOW - certificates.BACKDATED


def test_a_brokers_certificate_is_for_servers_only_and_names_its_hosts(authority):
    found = parsed(authority.broker(["broker.example", "10.0.0.7", "::1", "broker.example"]))
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.example"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "::1"]
    [common] = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    with pytest.raises(Exception, match="is not a device name"):
        ids.device_id(common.value)


def test_openssl_believes_the_chain_and_the_list(authority, tmp_path):
    if shutil.which("openssl") is None:
        missing_service("openssl is not installed (Debian: apt-get install openssl)")
    now = datetime.now(UTC).replace(microsecond=0)
    authority = Authority.create(tmp_path / "today", FLEET, clock=lambda: now)
    issued = {
        "good": authority.device("good"),
        "bad": authority.device("bad"),
        "broker": authority.broker(["b.example"]),
    }
    for name, one in issued.items():
        (tmp_path / f"{name}.crt").write_bytes(one.certificate)
    authority.revoke("bad")
    folder = tmp_path / "today"

    def verify(name, purpose):
        command = ["openssl", "verify", "-x509_strict", "-CAfile", folder / "ca.crt", "-crl_check"]
        command += ["-CRLfile", folder / "crl.pem", "-purpose", purpose, tmp_path / f"{name}.crt"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode == 0, done.stderr

    assert verify("good", "sslclient")[0], verify("good", "sslclient")
    assert verify("broker", "sslserver")[0]
    assert not verify("good", "sslserver")[0]
    assert not verify("broker", "sslclient")[0]
    refused, why = verify("bad", "sslclient")
    assert not refused
    assert "certificate revoked" in why


def test_the_key_made_on_the_spot_fits(authority, tmp_path):
    issued = authority.device("pump-17")
    (tmp_path / "crt").write_bytes(issued.certificate)
    (tmp_path / "key").write_bytes(issued.key)
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(tmp_path / "crt", tmp_path / "key")


def test_nothing_outlives_the_authority(tmp_path):
    moment = [NOW]
    authority = Authority.create(tmp_path / "authority", FLEET, clock=lambda: moment[0])
    moment[0] += certificates.AUTHORITY_LIFE - timedelta(days=3)
    end = NOW + certificates.AUTHORITY_LIFE
    issued = authority.device("pump-17", days=365)
    assert parsed(issued).not_valid_after_utc == end == issued.entry.end


def test_the_list_is_valid_as_long_as_the_authority_for_an_expired_one_locks_everybody_out(
    authority, tmp_path
):
    found = x509.load_pem_x509_crl((tmp_path / "authority" / "crl.pem").read_bytes())
    assert found.next_update_utc == NOW + certificates.AUTHORITY_LIFE


def test_the_authority_can_make_no_further_ones(authority):
    found = x509.load_pem_x509_certificate(authority.certificate.read_bytes())
    assert found.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


def test_its_key_is_its_owners_alone(authority, tmp_path):
    assert stat.S_IMODE((tmp_path / "authority").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "authority" / "ca.key").stat().st_mode) == 0o600


# ── requests ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
    ],
    ids=["p256", "p384", "ed25519"],
)
def test_a_request_leaves_the_key_where_it_was_made(authority, tmp_path, key):
    issued = authority.device("pump-17", request=request(tmp_path, key=key))
    assert issued.key is None
    assert parsed(issued).public_key() == key.public_key()


def test_rsa_is_accepted_from_2048_bits_on(authority, tmp_path):
    strong = rsa.generate_private_key(65537, 2048)
    assert (
        parsed(authority.device("pump-17", request=request(tmp_path, key=strong))).public_key()
        == strong.public_key()
    )


WEAK = {
    "rsa": lambda: rsa.generate_private_key(65537, 1024),
    "curve": lambda: ec.generate_private_key(ec.SECP192R1()),
    "kind": lambda: dsa.generate_private_key(2048),
}


@pytest.mark.parametrize("which", WEAK)
def test_weak_and_odd_keys_are_refused(authority, tmp_path, which):
    with pytest.raises(EnrolError, match="key is not accepted"):
        authority.device("pump-17", request=request(tmp_path, key=WEAK[which]()))


def test_nothing_that_a_request_wishes_for_is_copied(authority, tmp_path):
    wishes = (
        x509.BasicConstraints(ca=True, path_length=None),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.SubjectAlternativeName([x509.DNSName("broker.example")]),
    )
    plain = parsed(authority.device("pump-18"))
    found = parsed(authority.device("pump-17", request=request(tmp_path, extensions=wishes)))
    of_keys = (x509.SubjectKeyIdentifier,)
    same = [
        {e.oid: e.value for e in c.extensions if not isinstance(e.value, of_keys)} for c in (plain, found)
    ]
    assert same[0] == same[1]


def name(*parts):
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])


SUBJECTS = {
    "another": name((NameOID.COMMON_NAME, "pump-18")),
    "a service": name((NameOID.COMMON_NAME, SERVICES["coordinator"])),
    "two names": name((NameOID.COMMON_NAME, SERVICES["coordinator"]), (NameOID.COMMON_NAME, "pump-17")),
    "more": name((NameOID.COMMON_NAME, "pump-17"), (NameOID.ORGANIZATION_NAME, "x")),
    "in another field": name((NameOID.ORGANIZATION_NAME, "pump-17")),
    "none": name(),
    "larger": name((NameOID.COMMON_NAME, "Pump-17")),
}


@pytest.mark.parametrize("which", SUBJECTS)
def test_a_request_for_another_name_is_refused(authority, tmp_path, which):
    with pytest.raises(EnrolError, match="not for 'CN=pump-17': make it with -subj /CN=pump-17"):
        authority.device("pump-17", request=request(tmp_path, subject=SUBJECTS[which]))
    assert authority.entries() == ()


def test_a_request_that_was_changed_on_the_way_is_refused(authority, tmp_path):
    """The key of a stranger under the device's own request: whoever signs must hold the key."""
    key = certificates.new_key()
    path = request(tmp_path, key=key)
    der = x509.load_pem_x509_csr(path.read_bytes()).public_bytes(serialization.Encoding.DER)
    own, other = (certificates.public_bytes(k.public_key()) for k in (key, certificates.new_key()))
    assert own in der
    path.write_bytes(der.replace(own, other))
    with pytest.raises(EnrolError, match="its signature is not that of the key in it"):
        authority.device("pump-17", request=path)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN CERTIFICATE REQUEST-----\nx", b"\x30\x82", None])
def test_what_is_no_request_is_refused(authority, tmp_path, content):
    path = tmp_path / "pump-17.csr"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EnrolError, match=r"pump-17\.csr: (not a certificate request|cannot be read)"):
        authority.device("pump-17", request=path)


# ── names ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wrong", [*SERVICES.values(), RESERVED, f"{RESERVED}anything"])
def test_no_device_gets_the_name_of_a_service(authority, wrong):
    with pytest.raises(EnrolError, match="is no name for a device"):
        authority.device(wrong)


@pytest.mark.parametrize("wrong", ["+", "#", "a/b", "Pump", "", "a" * 65, "skiff broker", "a\n", "ä"])
def test_what_is_no_id_gets_no_certificate(authority, wrong):
    with pytest.raises(EnrolError, match="is not a device name"):
        authority.device(wrong)


@pytest.mark.parametrize("wrong", ["pump-17", "skiff-aggregator", ""])
def test_there_are_no_other_services(authority, wrong):
    with pytest.raises(
        EnrolError, match="it is one of aggregator, coordinator, publisher, labeller, observer"
    ):
        authority.service(wrong)


def test_no_service_has_a_name_that_a_device_could_have(authority):
    assert all(common.startswith(RESERVED) for common in SERVICES.values())
    assert [parsed(authority.service(which)).subject.rfc4514_string() for which in SERVICES] == [
        f"CN={common}" for common in SERVICES.values()
    ]


@pytest.mark.parametrize(
    "wrong", ["*.example", "Broker", "a_b", "", "-a", "a" * 254, "a/b", "a b", "1.2.3.4.5/8"]
)
def test_what_is_no_host_is_refused(authority, wrong):
    with pytest.raises(EnrolError, match="neither an address nor a host name"):
        authority.broker([wrong])


@pytest.mark.parametrize("days", [0, -1, 3651])
def test_days_are_bounded(authority, days):
    with pytest.raises(EnrolError, match="are outside"):
        authority.device("pump-17", days=days)


# ── renewing and revoking ──────────────────────────────────────────────────────────────────────────────


def test_enrolling_twice_is_refused_and_renewing_keeps_the_earlier_certificate(authority):
    first = authority.device("pump-17").entry
    with pytest.raises(
        EnrolError, match=f"has a certificate, {first.serial}, valid until 2031-01-01: renew it"
    ):
        authority.device("pump-17")
    second = authority.device("pump-17", renew=True).entry
    assert [entry.state(NOW) for entry in authority.entries()] == ["valid", "valid"]
    assert [entry.serial for entry in authority.revoke(first.serial)] == [first.serial]
    assert [entry.state(NOW) for entry in authority.entries()] == ["revoked", "valid"]
    assert authority.retired() == ()
    authority.revoke(second.serial)
    assert authority.retired() == ("pump-17",)


def test_renewing_what_never_was_or_was_revoked_is_refused(authority):
    with pytest.raises(EnrolError, match="was never enrolled"):
        authority.device("pump-17", renew=True)
    authority.device("pump-17")
    authority.revoke("pump-17")
    with pytest.raises(EnrolError, match="was revoked; enrol it anew"):
        authority.device("pump-17", renew=True)
    authority.device("pump-17")
    assert authority.retired() == ()


def test_after_the_certificate_expired_a_device_is_simply_enrolled(tmp_path):
    moment = [NOW]
    authority = Authority.create(tmp_path / "authority", FLEET, clock=lambda: moment[0])
    authority.device("pump-17", days=1)
    moment[0] += timedelta(days=2)
    assert [entry.state(moment[0]) for entry in authority.entries()] == ["expired"]
    authority.device("pump-17")


def test_a_name_whose_only_valid_certificate_was_revoked_is_denied_though_an_expired_one_never_was(tmp_path):
    moment = [NOW]
    authority = Authority.create(tmp_path / "authority", FLEET, clock=lambda: moment[0])
    authority.device("pump-17", days=1)
    authority.device("pump-18", days=1)
    serial = authority.device("pump-17", days=9, renew=True).entry.serial
    authority.revoke(serial)
    assert authority.retired() == ()
    moment[0] += timedelta(days=2)
    assert authority.retired() == ("pump-17",)


def test_a_key_is_one_devices_and_dies_with_its_certificate(authority, tmp_path):
    key = certificates.new_key()
    authority.device("pump-17", request=request(tmp_path, key=key))
    with pytest.raises(EnrolError, match="its key is that of pump-17: each one makes its own"):
        authority.device("pump-18", request=request(tmp_path, "pump-18", key=key))
    authority.device("pump-17", request=request(tmp_path, key=key), renew=True)
    authority.revoke("pump-17")
    with pytest.raises(EnrolError, match="with this key was revoked"):
        authority.device("pump-17", request=request(tmp_path, key=key))


def test_the_list_has_every_revoked_certificate_and_a_rising_number(authority, tmp_path):
    entries = [authority.device(f"pump-{i}").entry for i in range(3)] + [authority.service("labeller").entry]
    before = authority.revocations()
    authority.revoke("pump-0")
    authority.revoke(SERVICES["labeller"])
    after = authority.revocations()
    assert revoked_serials(before) == set()
    assert revoked_serials(after) == {int(entries[0].serial, 16), int(entries[3].serial, 16)}
    assert list_number(after) == list_number(before) + 2
    assert authority.revoke("pump-0") == ()
    assert list_number(authority.revocations()) == list_number(after)
    assert authority.retired() == ("pump-0", SERVICES["labeller"])


def test_a_serial_may_be_written_as_openssl_does(authority):
    serial = authority.device("pump-17").entry.serial
    colons = ":".join(serial[i : i + 2] for i in range(0, 32, 2)).upper()
    assert [entry.serial for entry in authority.revoke(colons)] == [serial]


def test_revoking_what_was_not_issued_or_no_broker_heeds_is_refused(authority):
    with pytest.raises(EnrolError, match="no certificate of that name or serial"):
        authority.revoke("pump-17")
    serial = authority.broker(["broker.example"]).entry.serial
    with pytest.raises(EnrolError, match="Devices read no list of revoked certificates"):
        authority.revoke(serial)


# ── the folder ─────────────────────────────────────────────────────────────────────────────────────────


def test_creating_again_opens_what_is_there_and_only_for_the_same_fleet(authority, tmp_path):
    before = authority.certificate.read_bytes()
    assert Authority.create(tmp_path / "authority", FLEET).certificate.read_bytes() == before
    with pytest.raises(EnrolError, match="is the authority of fleet demo, not of other"):
        Authority.create(tmp_path / "authority", ids.fleet_id("other"))


def test_it_is_never_made_among_other_files(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnrolError, match="no authority here"):
        Authority.create(tmp_path, FLEET)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_the_disk_refuses_is_said(authority, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnrolError, match=r"Not a directory; mend that"):
        Authority.create(tmp_path / "file" / "authority", FLEET)
    (tmp_path / "authority" / "issued").touch()
    with pytest.raises(EnrolError, match=r"issued.*; mend that"):
        authority.device("pump-17")
    assert authority.entries() == ()


def test_listing_needs_no_key_and_issuing_says_which_is_missing(authority, tmp_path):
    authority.device("pump-17")
    (tmp_path / "authority" / "ca.key").rename(tmp_path / "safe")
    opened = Authority(tmp_path / "authority")
    assert [entry.name for entry in opened.entries()] == ["pump-17"]
    with pytest.raises(EnrolError, match=r"ca\.key: cannot be read"):
        opened.device("pump-18")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"fleet": "demo", "list": 1, "issued": [{}]}', b'{"fleet": "+"}']
)
def test_a_damaged_index_is_said_and_not_overwritten(authority, tmp_path, content):
    path = tmp_path / "authority" / "index.json"
    path.write_bytes(content)
    with pytest.raises(EnrolError, match=r"index\.json"):
        authority.device("pump-17")
    assert path.read_bytes() == content


def test_a_key_of_another_authority_is_noticed(authority, tmp_path):
    Authority.create(tmp_path / "other", FLEET)
    shutil.copy(tmp_path / "other" / "ca.key", tmp_path / "authority" / "ca.key")
    with pytest.raises(EnrolError, match="the key is not that of the authority's certificate"):
        authority.device("pump-17")


def test_two_at_once_lose_no_entry(authority, tmp_path):
    others = [Authority(tmp_path / "authority") for _ in range(6)]
    threads = [threading.Thread(target=one.device, args=(f"pump-{i}",)) for i, one in enumerate(others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = authority.entries()
    assert {entry.name for entry in entries} == {f"pump-{i}" for i in range(6)}
    assert len({entry.serial for entry in entries}) == 6


class Crash(Exception):
    pass


@pytest.mark.parametrize("change", ["device", "revoke"])
def test_after_a_crash_at_any_write_every_certificate_that_left_can_be_revoked(tmp_path, monkeypatch, change):
    real = files.write
    for count in itertools.count():
        folder = tmp_path / f"authority-{count}"
        authority = Authority.create(folder, FLEET)
        authority.device("old")
        left = itertools.count()

        def write(path, data, *, mode=0o644, left=left, count=count):
            if next(left) == count:
                raise Crash
            real(path, data, mode=mode)

        monkeypatch.setattr(files, "write", write)
        issued, crashed = None, False
        try:
            issued = authority.device("new") if change == "device" else authority.revoke("old")
        except Crash:
            crashed = True
        monkeypatch.setattr(files, "write", real)
        reopened = Authority(folder)
        names = [entry.name for entry in reopened.entries()]
        assert issued is None or names == (["old", "new"] if change == "device" else ["old"])
        held = [entry for entry in reopened.entries() if entry.name == "new"]
        again = reopened.device("new", renew=bool(held)).entry
        assert again.serial not in {entry.serial for entry in held}
        reopened.revoke("old")
        reopened.revoke("new")
        wanted = {int(entry.serial, 16) for entry in reopened.entries()}
        assert revoked_serials(reopened.revocations()) == wanted
        if not crashed:
            break
    assert count == 2


def test_a_list_that_fell_behind_the_index_is_made_again(authority, tmp_path):
    authority.device("pump-17")
    stale = authority.revocations()
    authority.revoke("pump-17")
    for content in (stale, None):
        path = tmp_path / "authority" / "crl.pem"
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert len(revoked_serials(Authority(tmp_path / "authority").revocations())) == 1


# ── a restored index ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def restored(authority, tmp_path, caplog):
    """An authority whose index is that of a backup, from before pump-1 was revoked and pump-2 and a broker enrolled."""
    folder = tmp_path / "authority"
    for name in ("pump-0", "pump-1"):
        authority.device(name)
    backup = (folder / "index.json").read_bytes()
    authority.revoke("pump-1")
    authority.device("pump-2")
    authority.broker(["b.example", "::1"])
    authority.service("observer")
    (folder / "index.json").write_bytes(b"damaged")
    with pytest.raises(EnrolError, match="restore it from its backup: what was issued and revoked since"):
        Authority(folder)
    before = folder / "whole.json"
    before.write_bytes(backup)
    before.rename(folder / "index.json")
    caplog.clear()
    return folder


def test_a_restored_index_takes_back_no_revocation_and_forgets_no_certificate(restored, caplog):
    opened = Authority(restored, clock=lambda: NOW)
    assert opened.retired() == ("pump-1",), "also for whoever only looks"
    assert "is older than what stands beside it" in caplog.text
    assert "revocation of pump-1" in caplog.text
    number = list_number((restored / "crl.pem").read_bytes())
    listed = opened.revocations()
    assert (list_number(listed), len(revoked_serials(listed))) == (number, 1)
    [broker] = [entry for entry in opened.entries() if entry.kind == "broker"]
    assert broker.hosts == ("b.example", "::1")
    assert {(e.name, e.kind) for e in opened.entries()} == {
        ("pump-0", "device"),
        ("pump-1", "device"),
        ("pump-2", "device"),
        ("skiff broker", "broker"),
        (SERVICES["observer"], "service"),
    }
    assert [entry.name for entry in opened.revoke("pump-2")] == ["pump-2"]
    after = opened.revocations()
    assert (list_number(after), len(revoked_serials(after))) == (number + 1, 2)
    caplog.clear()
    assert Authority(restored, clock=lambda: NOW).retired() == ("pump-1", "pump-2")
    assert not caplog.text, "the index is whole again"


def test_what_is_added_is_what_was_there(authority, restored):
    lines = {}
    for entry in Authority(restored).entries():
        [found] = [line for line in authority.entries() if line.serial == entry.serial]
        lines[entry.name] = (entry, found)
    issued = {path.stem for path in (restored / "issued").iterdir()}
    assert {entry.serial for entry, _ in lines.values()} == issued
    (restored / "index.json").write_bytes(json.dumps({"fleet": "demo", "list": 1, "issued": []}).encode())
    assert {e.serial: e for e in Authority(restored).entries()} == {
        before.serial: before for _, before in lines.values()
    }


@pytest.mark.parametrize("seed", range(8))
def test_whatever_index_is_restored_no_revocation_is_lost_and_no_number_falls(tmp_path, seed):
    rng = random.Random(seed)
    folder = tmp_path / "authority"
    authority = Authority.create(folder, FLEET, clock=lambda: NOW)
    backups, revoked, names = [], set(), []
    number = 1
    for step in range(14):
        backups.append((folder / "index.json").read_bytes())
        match rng.choice(["device", "device", "revoke", "restore"]):
            case "device":
                names.append(f"pump-{step}")
                authority.device(names[-1])
            case "revoke" if names:
                name = rng.choice(names)
                authority.revoke(name)
                revoked.add(name)
            case _:
                (folder / "index.json").write_bytes(rng.choice(backups))
        listed = authority.revocations()
        by_name = {entry.name: int(entry.serial, 16) for entry in authority.entries()}
        assert set(by_name) == set(names)
        assert revoked_serials(listed) == {by_name[name] for name in revoked}
        assert list_number(listed) >= number
        number = list_number(listed)
        assert authority.retired() == tuple(sorted(revoked))


def test_a_revocation_whose_certificate_is_gone_as_well_is_kept(authority, restored, caplog):
    [serial] = [e.serial for e in Authority(restored).entries() if e.revoked]
    whole = (restored / "issued" / f"{serial}.crt").read_bytes()
    (restored / "issued" / f"{serial}.crt").unlink()
    (restored / "index.json").write_bytes(b'{"fleet": "demo", "list": 1, "issued": []}')
    opened = Authority(restored, clock=lambda: NOW)
    opened.device("pump-3")
    assert f"revocation of {serial}, whose name is unknown until issued/{serial}.crt is back" in caplog.text
    opened.revoke("pump-3")
    assert int(serial, 16) in revoked_serials(opened.revocations())
    (restored / "crl.pem").unlink()
    assert int(serial, 16) in revoked_serials(opened.revocations()), "the index remembers it"
    (restored / "issued" / f"{serial}.crt").write_bytes(whole)
    assert opened.retired() == ("pump-1", "pump-3")


@pytest.mark.parametrize("content", ["damaged", "another authority's", "altered"])
def test_a_list_that_is_not_the_authoritys_is_never_written_over(authority, tmp_path, content):
    authority.device("pump-17")
    authority.revoke("pump-17")
    path = tmp_path / "authority" / "crl.pem"
    other = Authority.create(tmp_path / "other", FLEET)
    pem = path.read_bytes().splitlines()
    data = {
        "damaged": b"damaged",
        "another authority's": other.revocations(),
        "altered": b"\n".join([*pem[:-2], pem[-2].swapcase(), pem[-1]]),
    }[content]
    path.write_bytes(data)
    with pytest.raises(EnrolError, match=r"crl\.pem: .*put the broker's certs/crl\.pem there"):
        Authority(tmp_path / "authority")
    assert path.read_bytes() == data
    path.unlink()
    assert len(revoked_serials(Authority(tmp_path / "authority").revocations())) == 1


def test_a_certificate_of_another_authority_is_not_taken_in(authority, tmp_path):
    other = Authority.create(tmp_path / "other", FLEET)
    stranger = other.device("stranger")
    authority.device("pump-17")
    path = tmp_path / "authority" / "issued" / f"{stranger.entry.serial}.crt"
    path.write_bytes(stranger.certificate)
    with pytest.raises(EnrolError, match="it is no certificate of this authority"):
        Authority(tmp_path / "authority")
    path.unlink()
    own = Authority(tmp_path / "authority").device("pump-18").entry.serial
    (tmp_path / "authority" / "issued" / f"{own}.crt").rename(path)
    (tmp_path / "authority" / "index.json").write_bytes(b'{"fleet": "demo", "list": 1, "issued": []}')
    with pytest.raises(EnrolError, match=f"is certificate {own}: give it that name"):
        Authority(tmp_path / "authority")


def test_an_index_that_is_gone_is_not_taken_for_no_authority(authority, tmp_path):
    (tmp_path / "authority" / "index.json").unlink()
    for act in (Authority, lambda folder: Authority.create(folder, FLEET)):
        with pytest.raises(EnrolError, match=r"index\.json: is missing; restore it from its backup"):
            act(tmp_path / "authority")


def test_serials_are_128_random_bits(monkeypatch):
    monkeypatch.setattr("secrets.randbits", lambda bits: 0 if bits == 128 else pytest.fail("not 128 bits"))
    assert certificates.new_serial() == 1, "a serial is positive (RFC 5280, 4.1.2.2)"


def test_a_serial_that_was_given_is_not_given_again(authority, monkeypatch):
    drawn = iter([7, 7, 8])
    monkeypatch.setattr(certificates, "new_serial", lambda: next(drawn))
    assert [authority.device(name).entry.serial[-1] for name in ("a", "b")] == ["7", "8"]


def test_the_index_says_what_was_issued(authority, tmp_path):
    entry = authority.broker(["b.example"]).entry
    [row] = json.loads((tmp_path / "authority" / "index.json").read_bytes())["issued"]
    assert (row["serial"], row["kind"], row["hosts"], row["revoked"]) == (
        entry.serial,
        "broker",
        ["b.example"],
        "",
    )
    assert (tmp_path / "authority" / "issued" / f"{entry.serial}.crt").exists()
