"""What a broker would say of this device's certificate, found out without one."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Seen:
    """What a server sees that asks for a certificate: a ``problem``, or who it is and until when (seconds of UTC)."""

    problem: str = ""
    common_name: str = ""
    expires_seconds: float = 0.0


def look_at(certificate: str, key: str, ca: str) -> Seen:
    """Runs a TLS handshake in memory, in which a server asks for the certificate and OpenSSL judges it.

    The dates, the purpose and the key are judged as a broker would; the chain is not, for whom the broker trusts is
    not known here (``ca`` signs the *broker's* certificate): the certificate itself is taken as trusted.
    Python has no public parser for certificates; only a handshake gives it decoded.
    """
    try:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(certificate, key)
        server.load_verify_locations(certificate)
        server.verify_mode = ssl.CERT_REQUIRED
        server.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        client = ssl.create_default_context(cafile=ca or None)
        client.check_hostname = False
        client.verify_mode = ssl.CERT_NONE  # the server here wears the device's own certificate
        client.load_cert_chain(certificate, key)
        peer = _handshake(client, server)
    except ssl.SSLCertVerificationError as e:
        return Seen(e.verify_message)
    except (OSError, ValueError) as e:
        return Seen(str(e))
    names = [value for part in peer.get("subject", ()) for name, value in part if name == "commonName"]
    return Seen("", names[0] if names else "", float(ssl.cert_time_to_seconds(str(peer["notAfter"]))))


def _handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> Mapping[str, Any]:
    """The client's certificate, decoded; raises `ssl.SSLError` as the server would."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = server.wrap_bio(to_server, to_client, server_side=True)
    asked = client.wrap_bio(to_client, to_server)
    done = {asked: False, asking: False}
    for _ in range(8):  # TLS 1.3 takes two turns
        for side in done:
            try:
                side.do_handshake()
                done[side] = True
            except ssl.SSLWantReadError:
                continue
        if all(done.values()):
            return asking.getpeercert() or {}
    raise ssl.SSLError("the handshake does not end")
