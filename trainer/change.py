"""What an operation on a repository would write, and who has to sign it: for a person to read before it is done."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Signers:
    """``threshold`` of ``keys`` keys of ``role`` must sign; the private keys in ``here`` are at hand, by file name.

    Keys that the operation makes itself are at hand.
    """

    role: str
    threshold: int
    keys: int
    here: tuple[str, ...]

    @property
    def enough(self) -> bool:
        """Whether the operation can be done with what is at hand."""
        return len(self.here) >= self.threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A file of metadata: its version, until when it is believed (UTC), and each group of keys that must sign it."""

    name: str
    version: int
    expires: datetime
    signers: tuple[Signers, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One operation: ``metadata`` in the order in which it is written, and the key files it makes or removes."""

    purpose: str
    metadata: tuple[Written, ...] = ()
    new_keys: tuple[str, ...] = ()
    removed_keys: tuple[str, ...] = ()

    @property
    def possible(self) -> bool:
        """Whether every key that must sign is at hand."""
        return all(group.enough for written in self.metadata for group in written.signers)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleState:
    """A role as it is: until when its metadata is believed (None: it has none of its own), and its keys.

    ``keys`` are (keyid, file of the private key, "" where it is not here).
    """

    name: str
    version: int | None
    expires: datetime | None
    threshold: int
    keys: tuple[tuple[str, str], ...]
