"""The folder of a repository: opened only as the keys' own, and changed whole or not at all.

A change is signed in memory and written down in ``keys/last-change`` before its first file appears in ``metadata/``;
whoever opens the repository next writes what is missing. So no crash leaves a root that devices follow without the keys
and the metadata that belong to it, and no key is asked for twice. The note stays: metadata older than the last change
that was signed here is noticed, and replaced. It lies beside the keys: who can write ``metadata/`` must not write it.
"""

import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from securesystemslib.signer import CryptoSigner

from edge_runtime.contract import codec
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import Digest, digest_of
from edge_runtime.contract.messages import TrustBundle
from trainer import files
from trainer.change import Change, Written
from trainer.keyring import KEYS, Keyring, PublishError, new_key
from trainer.metadata import FIRST_ROOT, TIMESTAMP, Draft, Folder, MetadataSet

log = logging.getLogger(__name__)

LAST_CHANGE: Final = "last-change"
SPARE_BYTES: Final = 16 << 10
"""Kept in the metadata for new keys, and for revoking what is not published here."""
REVOCATION_BYTES: Final = 80
"""What a revoked digest takes: a line of JSON."""
_NAME: Final = re.compile(r"timestamp\.json|[1-9][0-9]*\.[A-Za-z0-9._-]+\.json")
_MAX_FILE_BYTES: Final = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a change is for, the new keys of ``role`` that it makes, and the names of those that go.

    ``grows``: it can wait, so it leaves room for what cannot, see `Store.commit`.
    """

    purpose: str
    role: str = ""
    fresh: Mapping[str, CryptoSigner] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    grows: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LastChange:
    """The signed files of a change, by name in the order in which they are written, and the keys that go with it."""

    purpose: str
    files: Mapping[str, bytes]
    removed: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """As it is written down."""
        texts = {name: data.decode() for name, data in self.files.items()}
        return json.dumps({"purpose": self.purpose, "removed": self.removed, "files": texts}).encode()

    @classmethod
    def read(cls, path: Path) -> "LastChange | None":
        """None where there is none, as in repositories from before it was written; raises `PublishError`."""
        try:
            with path.open("rb") as stream:
                f = Fields(json.loads(stream.read(_MAX_FILE_BYTES)), str(path), PublishError)
            texts = f.section("files")
            found = {name: texts.text(name, max_length=_MAX_FILE_BYTES).encode() for name in texts.names()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            raise PublishError(f"{path}: cannot be read ({e}); restore it from its backup") from e
        if list(found)[-1:] != [TIMESTAMP] or not all(map(_NAME.fullmatch, found)):
            raise PublishError(f"{path}: no change of metadata; restore it from its backup")
        return cls(purpose=f.text("purpose"), files=found, removed=f.texts("removed"))


class Store:
    """The repository in ``root``. ``look`` only: nothing is written, and what was interrupted is seen as finished."""

    def __init__(self, root: Path, clock: Callable[[], datetime], *, look: bool = False) -> None:
        self._root = root
        self._clock = clock
        self.metadata: Final = root / "metadata"
        self.keys: Final = Keyring(root / "keys")
        self._note: Final = root / "keys" / LAST_CHANGE
        self._look = look
        self._held = threading.local()

    @classmethod
    def create(cls, root: Path, clock: Callable[[], datetime]) -> None:
        """Makes a repository with new keys where there is none; raises `PublishError` where the rest of one is."""
        found = cls(root, clock)
        root.mkdir(parents=True, exist_ok=True)
        with files.locked(root / ".lock"):
            if found.exists:
                if not found.keys.any:
                    raise PublishError(
                        f"{root / 'keys'}: no key is there, and {found.metadata} has metadata: bring the keys back, at "
                        "least snapshot.json and timestamp.json"
                    )
                return
            found._refuse_remains()
            keys = {name: new_key() for names in KEYS.values() for name in names}
            first = MetadataSet.first(keys, clock())
            note = LastChange(purpose="making the repository", files=first)
            found.keys.create(keys, digest_of(first[FIRST_ROOT]), {LAST_CHANGE: note.to_bytes()})
            found._write(note)

    @property
    def exists(self) -> bool:
        """Whether there is a repository, be it one whose making was interrupted."""
        return (self.metadata / TIMESTAMP).exists() or self._note.exists()

    def _refuse_remains(self) -> None:
        """Raises `PublishError` where anything of a repository is: a new one there would shut out its devices."""
        folders = [self.metadata, self._root / "keys", self._root / "targets"]
        if found := [
            str(path.relative_to(self._root)) for path in folders if path.exists() and any(path.iterdir())
        ]:
            raise PublishError(
                f"{self._root}: there is {' and '.join(found)}, but metadata/{TIMESTAMP} is missing: restore metadata/ "
                "and keys/ from their backup. A new repository needs an empty folder, and devices of this one would "
                "not follow it"
            )

    # ── opening ────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def opened(self, *, anchored: bool = True) -> Iterator[MetadataSet]:
        """The metadata that counts, while nobody else changes it; raises `PublishError`.

        It descends from the first root that every key here names. ``anchored`` False: that is not looked at.
        """
        if not self.exists:
            self._refuse_remains()
            raise PublishError(
                f"{self._root}: no repository here; make one with: skiff pki init {self._root}"
            )
        with self._alone():
            note = LastChange.read(self._note)
            pending = note is not None and self._is_behind(note)
            if note is not None and pending and not self._look:
                log.warning("%s: writing what is missing of the last change: %s", self.metadata, note.purpose)
                self._write(note)
            overlay = note.files if note is not None and pending and self._look else {}
            metadata = MetadataSet.load(Folder(self.metadata, overlay), self.keys.staged())
            if anchored:
                self.keys.check(metadata.first_root, self.metadata / FIRST_ROOT)
            if not self._look and anchored:
                self._settle(metadata, note.removed if note is not None and pending else ())
            yield metadata

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the lock, once for all that a thread does inside."""
        if getattr(self._held, "here", False):
            yield
            return
        with (files.watched if self._look else files.locked)(self._root / ".lock"):
            self._held.here = True
            try:
                yield
            finally:
                self._held.here = False

    def _is_behind(self, note: LastChange) -> bool:
        """Whether ``metadata/`` is older than what ``note`` made of it: not yet that, or no longer."""
        try:
            here = (self.metadata / TIMESTAMP).read_bytes()
        except FileNotFoundError:
            return True
        return _version(here) < _version(note.files[TIMESTAMP])

    def _write(self, note: LastChange) -> None:
        for name, data in note.files.items():
            path = self.metadata / name
            if name.endswith(".root.json") and path.exists() and path.read_bytes() != data:
                raise PublishError(
                    f"{path}: not the root that was signed here. Find out where it comes from, and move it away: then "
                    "the change is finished"
                )
            files.write(path, data)

    def _settle(self, metadata: MetadataSet, removed: Iterable[str]) -> None:
        """New keys that the metadata names take their places, others go: nothing was ever written that names them."""
        if metadata.unfinished is not None:
            purpose = f"finishing the change that {metadata.root_version}.root.json began"
            log.warning("%s: %s", self.metadata, purpose)
            drafts = metadata.drafts(metadata.unfinished, self._clock())
            self.commit(metadata, drafts, Plan(purpose=purpose))
            metadata.unfinished = None
        for role in KEYS:
            self.keys.settle(role, metadata.keyids(role))
        self.keys.drop(removed)

    # ── changing ───────────────────────────────────────────────────────────────────────────────────────

    def commit(
        self, metadata: MetadataSet, drafts: list[Draft], plan: Plan, *, dry_run: bool = False
    ) -> Change:
        """Signs and writes, after making sure that devices that trust the first root only can still be told.

        What ``grows`` leaves room for revoking every published model, and `SPARE_BYTES`, so that the size of the
        metadata stops no revocation. ``dry_run`` only says what would be done. Raises `PublishError`, before anything
        is written.
        """
        change = Change(
            purpose=plan.purpose,
            metadata=tuple(
                Written(
                    name=draft.name,
                    version=draft.metadata.signed.version,
                    expires=draft.metadata.signed.expires,
                    signers=tuple(self.keys.at_hand(need, plan.fresh) for need in draft.needs),
                )
                for draft in drafts
            ),
            new_keys=tuple(self.keys.path(name).name for name in plan.fresh),
            removed_keys=tuple(self.keys.path(name).name for name in plan.removed),
        )
        if dry_run:
            return change
        if self._look:
            raise PublishError(f"{self._root}: opened to look only, so that nothing is changed")
        signed = {}
        for draft in drafts:
            groups = [self.keys.signers(need, purpose=plan.purpose, fresh=plan.fresh) for need in draft.needs]
            signed[draft.name] = draft.signed(
                {s.public_key.keyid: s for group in groups for s in group}.values()
            )
        self._check_size(metadata, signed, reserve=_reserve(metadata) if plan.grows else 0)
        self.keys.stage(plan.fresh, metadata.first_root)
        note = LastChange(purpose=plan.purpose, files=signed, removed=plan.removed)
        files.write(self._note, note.to_bytes(), mode=0o600)
        self._write(note)
        if plan.fresh:
            self.keys.settle(plan.role, [signer.public_key.keyid for signer in plan.fresh.values()])
        self.keys.drop(plan.removed)
        return change

    def _check_size(self, metadata: MetadataSet, fresh: Mapping[str, bytes], *, reserve: int) -> None:
        """Raises `PublishError` when a device that trusts the first root only could not be told ``fresh`` any more, or
        not ``reserve`` bytes more than that.
        """
        kept = [name for name in metadata.file_names(1) if name not in fresh]
        bundle = {name: (self.metadata / name).read_bytes() for name in kept} | dict(fresh)
        try:
            size = len(codec.encode(TrustBundle(root_version=1, files=tuple(bundle.items()))))
            problem = f"{size} bytes of {codec.MAX_MESSAGE_BYTES}, and {reserve} are kept for revocations"
        except ContractError as e:
            size, problem = codec.MAX_MESSAGE_BYTES + 1, str(e)
        if size + reserve > codec.MAX_MESSAGE_BYTES:
            count = sum(len(metadata.targets(role)) for role in metadata.roles)
            raise PublishError(
                f"{self._root}: the metadata of {count} models does not fit into one message ({problem}): retire "
                f"models that no device needs any more: skiff pki retire {self._root} DIGEST"
            )

    # ── the first root ─────────────────────────────────────────────────────────────────────────────────

    def first_root(self) -> bytes:
        """What devices are provisioned with; raises `PublishError` unless a key here says that it is genuine."""
        with self.opened() as metadata:
            if not self.keys.any:
                raise PublishError(
                    f"{self._root / 'keys'}: no key is here that says which first root is genuine: run this where the "
                    "snapshot and timestamp keys are, or copy root.json from a device that you trust"
                )
            return metadata.first_file

    def anchor(self, first_root: Digest) -> tuple[str, ...]:
        """Has every key here say that it belongs to ``first_root``; returns the files that did not.

        Raises `PublishError` when the metadata does not descend from it.
        """
        with self.opened(anchored=False) as metadata:
            if metadata.first_root != first_root:
                raise PublishError(
                    f"{self.metadata / FIRST_ROOT}: has SHA-256 {metadata.first_root}, not {first_root}. If your "
                    "devices have the latter as root.json, somebody replaced the metadata: restore it from its backup"
                )
            return self.keys.anchor(first_root)


def _reserve(metadata: MetadataSet) -> int:
    """The bytes that nothing may take that can wait."""
    vouched = {
        target.hashes["sha256"] for role in metadata.roles for target in metadata.targets(role).values()
    }
    return SPARE_BYTES + REVOCATION_BYTES * len(vouched - metadata.revoked)


def _version(timestamp: bytes) -> int:
    """The version that a timestamp says it has, 0 where it says none."""
    try:
        return int(json.loads(timestamp)["signed"]["version"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return 0
