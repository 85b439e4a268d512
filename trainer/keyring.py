"""The signing keys of a repository: one file per private key, made on first use, readable by their owner only.

Root and targets keys are meant to leave this machine once the first metadata is signed (a README in the folder says
how); an operation that needs them then says which are missing. The others stay: daily life needs them.

Each file also says which first root its key belongs to, by SHA-256. That knowledge travels with the keys, so who can
write the metadata only cannot have them sign for another root (docs/adr/0022).
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner

from edge_runtime.contract.errors import SkiffError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import Digest
from trainer import files
from trainer.change import Signers


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
"""The keys of each role in a new repository, by file name."""
SHARED: Final = ("root", "targets")
"""The roles that several keys sign for."""
MAX_KEYS: Final = 9
_THRESHOLDS: Final = {"root": 2, "targets": 2}
_MAX_FILE_BYTES: Final = 16 * 1024
_STAGED: Final = ".next.json"
_FIRST_ROOT: Final = "first_root"

_README: Final = """\
# Signing keys

Each file holds one Ed25519 private key. Whoever reads them can speak for the publisher: keep this folder out of backups
and version control that others can read. `skiff pki show` says which keys must sign now, and which of them are here.

| files | needed for | where they belong |
|---|---|---|
| root-1, root-2, root-3 (two) | replacing keys; renewal, once a year | **offline**, in three separate places |
| targets-1, targets-2 (both) | approving, revoking; renewal, once a year | **offline**, in two separate places |
| snapshot, timestamp | every publication; the refresh, at least once in seven days | here |
| builder | models that a retraining publishes on its own, where that was allowed | the machine that retrains |
| director | releases: which devices run which approved model | the coordinator's machine |

To use a key that was moved away, copy its file back, run the command, and remove it again. One lost root key is
repaired by rotating root (`skiff pki rotate`). With two lost, nothing can be replaced any more, and every device has to
be given a new root.

Each file names the first root by SHA-256 (`first_root`): its key signs nothing that does not descend from that root.
`last-change` stays here. It holds the signed files of the last change: one that was interrupted is finished from it,
and metadata that is older is noticed and replaced.
"""


def first_threshold(role: str) -> int:
    """How many keys of ``role`` must sign in a new repository."""
    return _THRESHOLDS.get(role, 1)


def names_of(role: str, count: int) -> tuple[str, ...]:
    """The file names of ``count`` keys of ``role``."""
    return tuple(f"{role}-{number}" for number in range(1, count + 1)) if role in SHARED else (role,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Who must sign: ``threshold`` of the keys ``keyids`` of ``role``, which is one of `KEYS`."""

    role: str
    keyids: tuple[str, ...]
    threshold: int


class Keyring:
    """The keys in one folder. A file is ``{"keyid": …, "private_key_pem": …, "first_root": …}`` with mode 0600."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self, keys: Mapping[str, CryptoSigner], first_root: Digest, more: Mapping[str, bytes]) -> None:
        """Makes the folder (mode 0700) with its README, ``keys`` by name and ``more`` files, all at once."""
        work = self._folder.with_name(f".{self._folder.name}.new")
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, signer in keys.items():
            _write_private(work / f"{name}.json", signer, first_root)
        for name, data in more.items():
            files.write(work / name, data, mode=0o600)
        files.write(work / "README.md", _README.encode())
        work.rename(self._folder)
        files.sync(self._folder.parent)

    @property
    def any(self) -> bool:
        """Whether any key is here."""
        return any(True for role in KEYS for _ in self._files(role))

    def check(self, first_root: Digest, path: Path) -> None:
        """Raises `PublishError` unless every key here says that it belongs to ``first_root``, found in ``path``."""
        for file in (file for role in KEYS for file, _ in self._files(role)):
            named = _document(file).text(_FIRST_ROOT, "")
            if not named:
                raise PublishError(
                    f"{file}: does not say which first root it belongs to, as keys of an earlier skiff do not, and "
                    f"signs nothing before it does. Take the SHA-256 of root.json from a device that you trust "
                    f"(sha256sum root.json), and run once: skiff pki anchor {path.parent.parent} SHA256"
                )
            if named != first_root:
                raise PublishError(
                    f"{file}: belongs to the first root with SHA-256 {named}, and {path} has {first_root}. Sign "
                    "nothing: somebody replaced the metadata, or the key is another repository's. Restore metadata/ "
                    "from its backup, or take the key away"
                )

    def anchor(self, first_root: Digest) -> tuple[str, ...]:
        """Has every key here say that it belongs to ``first_root``; returns the files that did not.

        Raises `PublishError`, before anything is written, when one belongs to another.
        """
        found = [
            (file, _document(file).text(_FIRST_ROOT, "")) for role in KEYS for file, _ in self._files(role)
        ]
        if strange := [file for file, named in found if named not in {"", first_root}]:
            raise PublishError(f"{strange[0]}: belongs to another first root; take it away")
        changed = [file for file, named in found if not named]
        for file in changed:
            _write_private(file, _load(file), first_root)
        return tuple(file.name for file in changed)

    def path(self, name: str) -> Path:
        """The file of the key ``name``."""
        return self._folder / f"{name}.json"

    def every(self, role: str) -> list[CryptoSigner]:
        """All keys of ``role`` in a new repository, none missing; raises `PublishError`."""
        return [_load(self.path(name)) for name in KEYS[role]]

    def here(self, role: str) -> dict[str, str]:
        """The file of every private key of ``role`` that is here, by its keyid; raises `PublishError`."""
        return {_load(path).public_key.keyid: path.name for path, _ in self._files(role)}

    def at_hand(self, need: Need, fresh: Mapping[str, CryptoSigner]) -> Signers:
        """What `signers` would find, by file name."""
        made = {signer.public_key.keyid: self.path(name).name for name, signer in fresh.items()}
        here = self.here(need.role) | made
        names = tuple(sorted(here[keyid] for keyid in need.keyids if keyid in here))
        return Signers(role=need.role, threshold=need.threshold, keys=len(need.keyids), here=names)

    def signers(
        self, need: Need, *, purpose: str, fresh: Mapping[str, CryptoSigner] | None = None
    ) -> list[CryptoSigner]:
        """The keys of ``need`` that are here or ``fresh``; raises `PublishError` when they are too few."""
        loaded = [_load(path) for path, _ in self._files(need.role)] + list((fresh or {}).values())
        found = {key.public_key.keyid: key for key in loaded if key.public_key.keyid in need.keyids}
        if len(found) < need.threshold:
            names = names_of(need.role, len(need.keyids))
            raise PublishError(
                f"{purpose} needs {need.threshold} of the {len(need.keyids)} {need.role} keys, and {len(found)} are "
                f"in {self._folder}: bring back {' and '.join(f'{name}.json' for name in names)}"
            )
        return list(found.values())

    def stage(self, fresh: Mapping[str, CryptoSigner], first_root: Digest) -> None:
        """Puts new keys, by name, on disk beside the old ones until `settle`."""
        for name, signer in fresh.items():
            _write_private(self._folder / f"{name}{_STAGED}", signer, first_root)

    def staged(self) -> frozenset[str]:
        """The keyids of new keys that have not been settled."""
        found = [path for role in KEYS for path, _ in self._files(role) if path.name.endswith(_STAGED)]
        return frozenset(_load(path).public_key.keyid for path in found)

    def settle(self, role: str, keyids: Collection[str]) -> None:
        """Staged keys of ``role`` that metadata names (``keyids``) take the old ones' place; others are removed."""
        for staged, name in [found for found in self._files(role) if found[0].name.endswith(_STAGED)]:
            if _load(staged).public_key.keyid in keyids:
                staged.replace(self.path(name))
            else:
                staged.unlink()

    def drop(self, names: Iterable[str]) -> None:
        """Removes keys that no metadata names any more."""
        for name in names:
            self.path(name).unlink(missing_ok=True)

    def _files(self, role: str) -> Iterator[tuple[Path, str]]:
        """Every key file of ``role`` that is here, with the key's name."""
        number = r"-[1-9][0-9]*" if role in SHARED else ""
        pattern = re.compile(rf"({role}{number})(\.next)?\.json")
        for path in sorted(self._folder.glob(f"{role}*.json")):
            if match := pattern.fullmatch(path.name):
                yield path, match[1]


def new_key() -> CryptoSigner:
    """A new Ed25519 key, in memory."""
    return CryptoSigner.generate_ed25519()


def _document(path: Path) -> Fields:
    try:
        with path.open("rb") as stream:
            return Fields(json.loads(stream.read(_MAX_FILE_BYTES)), str(path), PublishError)
    except OSError as e:
        raise PublishError(f"{path}: cannot be read ({e.strerror}); bring the key back") from e
    except ValueError as e:
        raise PublishError(f"{path}: not a key file ({e}); restore it from its backup") from e


def _load(path: Path) -> CryptoSigner:
    f = _document(path)
    try:
        key = load_pem_private_key(f.text("private_key_pem").encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise PublishError(f"{path}: not a key file ({e}); restore it from its backup") from e
    if not isinstance(key, Ed25519PrivateKey):
        raise PublishError(f"{path}: holds no Ed25519 key; restore it from its backup")
    signer = CryptoSigner(key)
    if f.text("keyid") != signer.public_key.keyid:
        raise PublishError(f"{path}: the keyid is not that of the key; restore the file from its backup")
    return signer


def _write_private(path: Path, signer: CryptoSigner, first_root: Digest) -> None:
    document = {
        "keyid": signer.public_key.keyid,
        "private_key_pem": signer.private_bytes.decode("ascii"),
        _FIRST_ROOT: first_root,
    }
    files.write(path, json.dumps(document, indent=1).encode(), mode=0o600)
