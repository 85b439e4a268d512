"""The director's signature on releases: Ed25519 over the release's payload."""

import json
import logging
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from aggregator.adapters.published import TIMESTAMP, director_keys
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.messages import SignedRelease
from edge_runtime.contract.release import Release, to_payload

log = logging.getLogger(__name__)


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
        self.keyid = f.text("keyid")
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
        return SignedRelease(payload=payload, signatures=((self.keyid, self._key.sign(payload)),))


class Director:
    """Who signs releases: the key in ``path``, read again when it changes, beside what ``metadata`` says of it.

    Without ``path`` nothing is signed. Where no ``metadata`` is, nobody can say whether devices take the signature.
    ``trouble`` tells why they would not, and what to do; it is empty when nothing speaks against it.

    Raises:
        ConfigError: the file cannot be read or holds no such key.
    """

    def __init__(self, path: Path | None, metadata: Path) -> None:
        self._path = path
        self._metadata = metadata
        self._seen: tuple[object, ...] | None = (
            self._stamps()
        )  # before it is read: what is written meanwhile counts
        self._signer = Signer(path) if path is not None else None
        self.trouble = ""
        if not self._judge():
            self._seen = None

    def sign(self, release: Release) -> SignedRelease | None:
        """The signed release, None without a key."""
        return self._signer.sign(release) if self._signer is not None else None

    def look(self) -> bool:
        """Reads what has changed on the disk; returns whether what was signed before is to be signed again."""
        stamps = self._stamps()
        if stamps == self._seen:
            return False
        self._seen = stamps
        before, troubled = self._signer, bool(self.trouble)
        if self._path is not None:
            try:
                self._signer = Signer(self._path)
            except ConfigError as e:
                log.warning("director_key_unreadable reason=%r: the one that was read before is used", str(e))
        if not self._judge():
            self._seen = None  # what lacks now may come without another change of what was looked at
        changed = before is not None and self._signer is not None and self._signer.keyid != before.keyid
        if changed:
            log.warning("director_key_changed path=%s", self._path)
        return changed or (troubled and not self.trouble)

    def _judge(self) -> bool:
        """Whether all that is there could be read; what cannot be changes nothing."""
        if self._signer is None:
            self.trouble = "no director key is configured, so no release can be signed: set director_key"
            return True
        named = director_keys(self._metadata)
        if named is None and (self._metadata / TIMESTAMP).exists():
            return False
        before, self.trouble = self.trouble, ""
        if named is not None and self._signer.keyid not in named:
            names = ", ".join(f"{keyid[:12]}…" for keyid in sorted(named)) or "none"
            self.trouble = (
                f"{self._path} holds the key {self._signer.keyid[:12]}…, but the director's is {names} by "
                f"{self._metadata}, so devices refuse every release: copy the director's key file (keys/director.json "
                "of the repository) there; it is read again without a restart"
            )
        if self.trouble and self.trouble != before:
            log.error("director_key_refused reason=%r", self.trouble)
        return True

    def _stamps(self) -> tuple[object, ...]:
        return _stamp(self._path), _stamp(self._metadata / TIMESTAMP)


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    """What differs when a file was written anew."""
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if found is not None else None
