"""The signing keys of a repository: one file per private key, made on first use, readable by their owner only.

Root and targets keys are meant to leave this machine once the first metadata is signed (``README`` in the folder says
how); an operation that needs one of them then says which is missing. The others stay, because the fleet's
daily life needs them.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner

from edge_runtime.contract.errors import SkiffError
from edge_runtime.contract.fields import Fields


class PublishError(SkiffError):
    """A repository, its keys or its metadata do not allow what was asked; the message says what is needed."""


KEYS: Final[dict[str, tuple[str, ...]]] = {
    "root": ("root-1", "root-2", "root-3"),
    "targets": ("targets-1", "targets-2"),
    "snapshot": ("snapshot",),
    "timestamp": ("timestamp",),
    "builder": ("builder",),
    "director": ("director",),
}
"""The keys of each role by file name."""
THRESHOLDS: Final = {"root": 2, "targets": 2}
"""How many of a role's keys must sign; one where nothing is said."""
OFFLINE: Final = ("root", "targets")
MAX_KEY_FILE_BYTES: Final = 16 * 1024

README: Final = """\
# Signing keys

Each file holds one Ed25519 private key. Whoever reads them can speak for the publisher: keep this folder out of backups
and version control that others can read.

| files | needed for | where they belong |
|---|---|---|
| root-1, root-2, root-3 (2 of 3) | replacing any key, once a year | **offline: move them to three separate places** |
| targets-1, targets-2 (both) | approving a model, revoking one, once a year | **offline: move them to two separate places** |
| snapshot, timestamp | every publication and the weekly refresh | here |
| builder | models that a retraining publishes on its own, where that was allowed | here, or on the build machine |
| director | releases: who runs which approved model | the coordinator's machine |

To use a key that was moved away, copy its file back, run the command, and remove it again. Losing one root key is
repaired with `rotate root`; losing two, or both targets keys and two root keys, means provisioning every device anew.
"""


def threshold(role: str) -> int:
    """How many keys of ``role`` must sign."""
    return THRESHOLDS.get(role, 1)


class Keyring:
    """The keys in one folder. Files are ``{"keyid": …, "private_key_pem": …}`` with mode 0600."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self) -> None:
        """Makes the folder (mode 0700), its README, and every key that is missing, if the folder is new.

        In an existing folder nothing is made: a key that was moved away must not be replaced by a stranger.
        """
        if self._folder.exists():
            return
        work = self._folder.with_name(f".{self._folder.name}.new")
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in (name for names in KEYS.values() for name in names):
            _write_private(work / f"{name}.json", _document(CryptoSigner.generate_ed25519()))
        (work / "README.md").write_text(README, encoding="utf-8")
        work.rename(self._folder)

    def path(self, name: str) -> Path:
        """Where the key ``name`` belongs."""
        return self._folder / f"{name}.json"

    def present(self, role: str) -> tuple[str, ...]:
        """The names of the keys of ``role`` that are here."""
        return tuple(name for name in KEYS[role] if self.path(name).exists())

    def signers(self, role: str, *, purpose: str) -> list[CryptoSigner]:
        """Every key of ``role`` that is here; raises `PublishError` when they are fewer than its threshold."""
        found = self.present(role)
        if len(found) < threshold(role):
            missing = ", ".join(str(self.path(name)) for name in KEYS[role] if name not in found)
            raise PublishError(
                f"{purpose} needs {threshold(role)} of the {len(KEYS[role])} {role} keys, and {len(found)} are here: "
                f"bring back {missing}"
            )
        return [self.load(name) for name in found]

    def load(self, name: str) -> CryptoSigner:
        """The key ``name``; raises `PublishError` when its file is missing, damaged or not the key it claims to be."""
        path = self.path(name)
        try:
            with path.open("rb") as stream:
                document = json.loads(stream.read(MAX_KEY_FILE_BYTES))
            f = Fields(document, str(path), PublishError)
            key = load_pem_private_key(f.text("private_key_pem").encode(), None)
        except OSError as e:
            raise PublishError(f"{path}: cannot be read ({e.strerror}); bring the key back") from e
        except (ValueError, TypeError, UnsupportedAlgorithm) as e:
            raise PublishError(f"{path}: not a key file ({e}); restore it from its backup") from e
        if not isinstance(key, Ed25519PrivateKey):
            raise PublishError(f"{path}: holds a {type(key).__name__}, an Ed25519 key is needed")
        signer = CryptoSigner(key)
        if f.text("keyid") != signer.public_key.keyid:
            raise PublishError(f"{path}: keyid does not belong to the key; restore the file from its backup")
        return signer

    def replace(self, role: str) -> dict[Path, bytes]:
        """New keys for every name of ``role``, as file contents to be written with `install`."""
        return {self.path(name): _document(CryptoSigner.generate_ed25519()) for name in KEYS[role]}

    def install(self, files: dict[Path, bytes], *, keep: Iterable[Path] = ()) -> None:
        """Writes key files, each atomically; those to ``keep`` stay beside the new ones as ``*.old``."""
        for path in keep:
            if path.exists():
                path.rename(path.with_suffix(".old"))
        for path, data in files.items():
            _write_private(path, data)


def signer_of(document: bytes) -> CryptoSigner:
    """The key in a key file's bytes that this process has just made."""
    key = load_pem_private_key(json.loads(document)["private_key_pem"].encode(), None)
    return CryptoSigner(key)


def _document(signer: CryptoSigner) -> bytes:
    return json.dumps(
        {"keyid": signer.public_key.keyid, "private_key_pem": signer.private_bytes.decode("ascii")}, indent=1
    ).encode()


def _write_private(path: Path, data: bytes) -> None:
    """Temp, fsync, rename: mode 0600 from the first byte on."""
    work = path.with_name(f".{path.name}.new")
    work.unlink(missing_ok=True)
    with os.fdopen(os.open(work, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    work.replace(path)
