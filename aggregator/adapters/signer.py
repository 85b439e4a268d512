"""The director's signature on releases: Ed25519 over the release's payload."""

import json
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.messages import SignedRelease
from edge_runtime.contract.release import Release, to_payload


class Signer:
    """Signs with the key in ``path``: a JSON file with ``keyid`` and ``private_key_pem`` (PKCS 8, Ed25519, no
    password).

    Raises:
        ConfigError: the file cannot be read or holds no such key.
    """

    def __init__(self, path: Path) -> None:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise ConfigError(
                f"{path}: cannot be read ({e.strerror}); director_key names the director's key file"
            ) from e
        except ValueError as e:
            raise ConfigError(f"{path}: not JSON ({e})") from e
        f = Fields(document, str(path), ConfigError)
        self._keyid = f.text("keyid")
        try:
            key = load_pem_private_key(f.text("private_key_pem", max_length=1 << 14).encode(), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as e:
            raise f.fail("private_key_pem", f"is no private key without a password ({e})") from e
        if not isinstance(key, Ed25519PrivateKey):
            raise f.fail("private_key_pem", f"is a {type(key).__name__}; the director signs with Ed25519")
        self._key = key

    def sign(self, release: Release) -> SignedRelease:
        """The release with the director's signature over its canonical bytes."""
        payload = to_payload(release)
        return SignedRelease(payload=payload, signatures=((self._keyid, self._key.sign(payload)),))
