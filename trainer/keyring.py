"""The signing keys of a repository: one file per private key, made on first use, readable by their owner only.

Root and targets keys are meant to leave this machine once the first metadata is signed (a README in the folder says
how); an operation that needs them then says which are missing. The others stay: daily life needs them.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner

from edge_runtime.contract.errors import SkiffError
from edge_runtime.contract.fields import Fields
from trainer import files


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
"""The keys of each role, by file name."""
_THRESHOLDS: Final = {"root": 2, "targets": 2}
_MAX_FILE_BYTES: Final = 16 * 1024
_STAGED: Final = ".next.json"

_README: Final = """\
# Signing keys

Each file holds one Ed25519 private key. Whoever reads them can speak for the publisher: keep this folder out of backups
and version control that others can read.

| files | needed for | where they belong |
|---|---|---|
| root-1, root-2, root-3 (two) | replacing keys; renewal, once a year | **offline**, in three separate places |
| targets-1, targets-2 (both) | approving, revoking; renewal, once a year | **offline**, in two separate places |
| snapshot, timestamp | every publication; the refresh, at least once in seven days | here |
| builder | models that a retraining publishes on its own, where that was allowed | the machine that retrains |
| director | releases: which devices run which approved model | the coordinator's machine |

To use a key that was moved away, copy its file back, run the command, and remove it again. One lost root key is
repaired by rotating root. With two lost, nothing can be replaced any more, and every device has to be given a new root.
"""


def threshold(role: str) -> int:
    """How many keys of ``role`` must sign."""
    return _THRESHOLDS.get(role, 1)


class Keyring:
    """The keys in one folder. A file is ``{"keyid": …, "private_key_pem": …}`` with mode 0600."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self) -> None:
        """Makes the folder (mode 0700) with its README and every key, all at once.

        An existing folder is left alone: a key that was moved away must not be replaced by a stranger.
        """
        if self._folder.exists():
            return
        work = self._folder.with_name(f".{self._folder.name}.new")
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in (name for names in KEYS.values() for name in names):
            _write_private(work / f"{name}.json", CryptoSigner.generate_ed25519())
        (work / "README.md").write_text(_README, encoding="utf-8")
        work.rename(self._folder)

    def path(self, name: str) -> Path:
        """The file of the key ``name``."""
        return self._folder / f"{name}.json"

    def every(self, role: str) -> list[CryptoSigner]:
        """All keys of ``role``, none missing; raises `PublishError`."""
        return [_load(self.path(name)) for name in KEYS[role]]

    def signers(self, role: str, keyids: Collection[str], *, purpose: str) -> list[CryptoSigner]:
        """The keys among ``keyids`` that are here; raises `PublishError` when they are too few for ``role``."""
        paths = [self._folder / f"{name}{end}" for name in KEYS[role] for end in (".json", _STAGED)]
        loaded = [_load(path) for path in paths if path.exists()]
        found = [signer for signer in loaded if signer.public_key.keyid in keyids]
        if len(found) < threshold(role):
            raise PublishError(
                f"{purpose} needs {threshold(role)} of the {len(keyids)} {role} keys, and {len(found)} are in "
                f"{self._folder}: bring back {' and '.join(f'{name}.json' for name in KEYS[role])}"
            )
        return found

    def stage(self, role: str) -> list[CryptoSigner]:
        """New keys for ``role``, on disk beside the old ones until `settle`."""
        fresh = [CryptoSigner.generate_ed25519() for _ in KEYS[role]]
        for name, signer in zip(KEYS[role], fresh, strict=True):
            _write_private(self._folder / f"{name}{_STAGED}", signer)
        return fresh

    def settle(self, role: str, keyids: Collection[str]) -> None:
        """Staged keys of ``role`` that metadata names (``keyids``) take the old ones' place; others are removed."""
        for name in KEYS[role]:
            staged = self._folder / f"{name}{_STAGED}"
            if not staged.exists():
                continue
            if _load(staged).public_key.keyid in keyids:
                staged.replace(self.path(name))
            else:
                staged.unlink()


def _load(path: Path) -> CryptoSigner:
    try:
        with path.open("rb") as stream:
            f = Fields(json.loads(stream.read(_MAX_FILE_BYTES)), str(path), PublishError)
        key = load_pem_private_key(f.text("private_key_pem").encode(), None)
    except OSError as e:
        raise PublishError(f"{path}: cannot be read ({e.strerror}); bring the key back") from e
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise PublishError(f"{path}: not a key file ({e}); restore it from its backup") from e
    if not isinstance(key, Ed25519PrivateKey):
        raise PublishError(f"{path}: holds no Ed25519 key; restore it from its backup")
    signer = CryptoSigner(key)
    if f.text("keyid") != signer.public_key.keyid:
        raise PublishError(f"{path}: the keyid is not that of the key; restore the file from its backup")
    return signer


def _write_private(path: Path, signer: CryptoSigner) -> None:
    document = {"keyid": signer.public_key.keyid, "private_key_pem": signer.private_bytes.decode("ascii")}
    files.write(path, json.dumps(document, indent=1).encode(), mode=0o600)
