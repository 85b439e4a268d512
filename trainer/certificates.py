"""X.509 for a fleet: its authority's certificate, those of brokers and clients, and the list of revoked ones.

Keys are ECDSA on P-256: every broker, TLS library and secure element of a device speaks it, Ed25519 many do not yet.

Source: RFC 5280 (certificates and revocation lists), RFC 2986 (requests). What a certificate is for stands in its
extended key usage, so that no device can pose as the broker, and no broker as a device.
"""

import ipaddress
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_runtime.contract.errors import SkiffError
from edge_runtime.contract.ids import FleetId

AUTHORITY_LIFE: Final = timedelta(days=3650)
BACKDATED: Final = timedelta(hours=1)
"""Certificates are valid from a little before they are made: clocks disagree."""
SERIAL_BITS: Final = 128
MIN_RSA_BITS: Final = 2048
_HOST: Final = re.compile(
    r"(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
)
_TRAITS: Final = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip

Use = Literal["client", "server"]
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey


class EnrolError(SkiffError):
    """An authority, a request or a certificate does not allow what was asked; the message says what is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A certificate to be made: of ``name``, for ``use``, with ``hosts`` where it is a server's. Times are UTC."""

    name: str
    use: Use
    serial: int
    start: datetime
    end: datetime
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Revoked:
    """An entry of the revocation list."""

    serial: int
    at: datetime


@dataclass(frozen=True, slots=True)
class RevocationList:
    """A list as it was read: its number, and when each serial was revoked (UTC)."""

    number: int
    revoked: dict[int, datetime]


@dataclass(frozen=True, slots=True)
class Authority:
    """The certificate that everyone in a fleet trusts, and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, fleet: FleetId, now: datetime) -> "Authority":
        """A new authority, for ten years. It may sign certificates of its own only, no further authorities."""
        key = new_key()
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet),
                x509.NameAttribute(NameOID.COMMON_NAME, "skiff authority"),
            ]
        )
        built = (
            _builder(name, name, key.public_key(), new_serial(), now - BACKDATED, now + AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
        )
        return cls(built.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, certificate: bytes, key: bytes, where: str) -> "Authority":
        """From two PEM files; raises `EnrolError` when they are none or do not belong together."""
        try:
            found = x509.load_pem_x509_certificate(certificate)
            private = serialization.load_pem_private_key(key, None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as e:
            raise EnrolError(f"{where}: the authority's files are damaged ({e}); restore them") from e
        if not isinstance(private, ec.EllipticCurvePrivateKey) or public_bytes(private.public_key()) != (
            public_bytes(_accepted(found.public_key(), where))
        ):
            raise EnrolError(f"{where}: the key is not that of the authority's certificate; restore it")
        return cls(found, private)

    @property
    def pem(self) -> bytes:
        """The authority's certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, wanted: Wanted, key: PublicKey) -> bytes:
        """The certificate (PEM). Nothing of it but the key comes from a request."""
        purpose = (
            ExtendedKeyUsageOID.CLIENT_AUTH if wanted.use == "client" else ExtendedKeyUsageOID.SERVER_AUTH
        )
        traits = ["digital_signature"]
        if isinstance(key, rsa.RSAPublicKey):  # the key exchange of TLS 1.2 without forward secrecy
            traits.append("key_encipherment")
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        built = (
            _builder(
                _name(wanted.name), self.certificate.subject, key, wanted.serial, wanted.start, wanted.end
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(*traits), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(issuer_key, critical=False)
        )
        if wanted.hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in wanted.hosts])
            built = built.add_extension(names, critical=False)
        return built.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def revocations(self, revoked: Iterable[Revoked], number: int, now: datetime) -> bytes:
        """The list of revoked certificates (PEM), the ``number``-th.

        It is as long valid as the authority: brokers refuse **everyone** once their list has expired.
        """
        end = self.certificate.not_valid_after_utc
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - BACKDATED)
            .next_update(end)
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
        )
        for entry in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(entry.serial).revocation_date(entry.at).build()
            )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A private key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def new_serial() -> int:
    """A serial number out of 128 random bits, never 0: a crash needs no counter to go on from."""
    return secrets.randbits(SERIAL_BITS) or 1


def private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS 8, PEM, without a password."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_bytes(key: PublicKey) -> bytes:
    """SubjectPublicKeyInfo, DER: the same bytes are the same key."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def read_authority(data: bytes, where: str) -> x509.Certificate:
    """The authority's certificate (PEM); raises `EnrolError`."""
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError as e:
        raise EnrolError(f"{where}: is no certificate ({e}); restore it from its backup") from e


def read_list(data: bytes, authority: x509.Certificate, where: str) -> RevocationList:
    """A list (PEM) that ``authority`` signed; raises `EnrolError` when it is none, for it may be the newest record."""
    try:
        found = x509.load_pem_x509_crl(data)
        number = found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        signed = found.issuer == authority.subject and found.is_signature_valid(
            _signing_key(authority, where)
        )
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound) as e:
        problem = f"is damaged ({e})"
    else:
        if signed:
            return RevocationList(number, {e.serial_number: e.revocation_date_utc for e in found})
        problem = "is not signed by this authority"
    raise EnrolError(
        f"{where}: {problem}, and it may be the only one that knows the newest revocations: put the broker's "
        "certs/crl.pem there. Only when index.json was never restored from a backup, remove the file instead: it is "
        "made again from the index"
    )


def read_issued(data: bytes, authority: x509.Certificate, where: str) -> tuple[Wanted, str]:
    """What a certificate (PEM) of ``authority`` says, and the SHA-256 of its key; raises `EnrolError`."""
    try:
        found = x509.load_pem_x509_certificate(data)
        found.verify_directly_issued_by(authority)
        [name] = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        key = sha256(public_bytes(_accepted(found.public_key(), where))).hexdigest()
        wanted = Wanted(
            name=str(name.value),
            use="server" if ExtendedKeyUsageOID.SERVER_AUTH in usage else "client",
            serial=found.serial_number,
            start=found.not_valid_before_utc,
            end=found.not_valid_after_utc,
            hosts=_hosts(found),
        )
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound) as e:
        raise EnrolError(
            f"{where}: index.json does not know it, and it is no certificate of this authority "
            f"({str(e) or type(e).__name__}): restore it from its backup, or take it away"
        ) from e
    return wanted, key


def read_request(data: bytes, name: str, where: str) -> PublicKey:
    """The key that a request (PEM or DER) for ``name`` asks a certificate for; all else in it is ignored.

    Raises `EnrolError`: it is none, it is not signed with its own key, its subject is not exactly ``CN=name``, or the
    key is of a kind that is not accepted.
    """
    try:
        pem = data.lstrip().startswith(b"-----BEGIN")
        request = x509.load_pem_x509_csr(data) if pem else x509.load_der_x509_csr(data)
        signed, subject = request.is_signature_valid, list(request.subject)
        key = request.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as e:
        raise EnrolError(f"{where}: not a certificate request ({e}); make it with openssl req -new") from e
    if not signed:
        raise EnrolError(f"{where}: its signature is not that of the key in it; it was changed on the way")
    if [(part.oid, part.value) for part in subject] != [(NameOID.COMMON_NAME, name)]:
        found = request.subject.rfc4514_string()
        raise EnrolError(
            f"{where}: it asks for {found!r:.200}, not for 'CN={name}': make it with -subj /CN={name}"
        )
    return _accepted(key, where)


def host_name(text: str) -> str:
    """Validates a broker's name (lower case, no wildcard) or address; raises `EnrolError`."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if not _HOST.fullmatch(text):
            raise EnrolError(f"{text!r} is neither an address nor a host name in lower case") from None
        return text


def _accepted(key: object, where: str) -> PublicKey:
    match key:
        case ec.EllipticCurvePublicKey() if key.curve.name in {"secp256r1", "secp384r1"}:
            return key
        case ed25519.Ed25519PublicKey():
            return key
        case rsa.RSAPublicKey() if key.key_size >= MIN_RSA_BITS:
            return key
    raise EnrolError(
        f"{where}: its key is not accepted: take ECDSA on P-256 or P-384, Ed25519, or RSA of {MIN_RSA_BITS} bits and up"
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _signing_key(authority: x509.Certificate, where: str) -> ec.EllipticCurvePublicKey:
    key = authority.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise EnrolError(f"{where}: the authority's certificate is not one that skiff made; restore it")
    return key


def _hosts(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in names)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*granted: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{trait: trait in granted for trait in _TRAITS})


def _builder(  # noqa: PLR0917 (the fields of a certificate, in their order)
    subject: x509.Name, issuer: x509.Name, key: PublicKey, serial: int, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def utc_now() -> datetime:
    """Now, in whole seconds: certificates know no finer times."""
    return datetime.now(UTC).replace(microsecond=0)
