"""Which digests the publisher vouches for, read from the metadata of its repository on this host's disk."""

import json
import logging
from pathlib import Path
from typing import Final

from edge_runtime.contract import trust
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import Digest

log = logging.getLogger(__name__)

MAX_FILE_BYTES: Final = 1 << 26
TIMESTAMP: Final = "timestamp.json"


def is_published(metadata: Path, digest: Digest) -> bool | None:
    """Whether the targets metadata that counts names ``digest`` and does not revoke it; None: no repository is there.

    Signatures are not looked at: the disk is the host's own, and devices verify every one of them. A file that cannot
    be read is logged, and nothing is published then. The order of files is that of The Update Framework 1.0, section 5:
    timestamp, snapshot, targets, the roles it delegates to.
    """
    if not (metadata / TIMESTAMP).exists():
        return None
    try:
        snapshot, targets = _top(metadata)
        if digest in trust.read_revoked({trust.TABLE: targets.peek(trust.TABLE) or {}}):
            return False
        roles = targets.section("delegations", {}).sections("roles", ())
        names = [name for name in (role.text("name") for role in roles) if name != trust.DIRECTOR]
        delegated = [_signed(metadata / f"{_version(snapshot, name)}.{name}.json") for name in names]
        return any(_names(role, digest) for role in (targets, *delegated))
    except (OSError, ValueError, ContractError) as e:
        log.warning("metadata_unreadable path=%s reason=%s", metadata, e)
        return False


def director_keys(metadata: Path) -> frozenset[str] | None:
    """The ids of the keys that devices take a release from, by the metadata that counts; None: nobody can say."""
    if not (metadata / TIMESTAMP).exists():
        return None
    try:
        _, targets = _top(metadata)
        roles = targets.section("delegations", {}).sections("roles", ())
        named = [role.texts("keyids") for role in roles if role.text("name") == trust.DIRECTOR]
        return frozenset(keyid for keyids in named for keyid in keyids)
    except (OSError, ValueError, ContractError) as e:
        log.warning("metadata_unreadable path=%s reason=%s", metadata, e)
        return None


def _top(metadata: Path) -> tuple[Fields, Fields]:
    """The snapshot and the targets that count."""
    snapshot = _signed(metadata / f"{_version(_signed(metadata / TIMESTAMP), 'snapshot')}.snapshot.json")
    return snapshot, _signed(metadata / f"{_version(snapshot, 'targets')}.targets.json")


def _signed(path: Path) -> Fields:
    with path.open("rb") as stream:
        return Fields(json.loads(stream.read(MAX_FILE_BYTES)), str(path)).section("signed")


def _version(f: Fields, role: str) -> int:
    return f.section("meta").section(f"{role}.json").integer("version", low=1)


def _names(role: Fields, digest: Digest) -> bool:
    targets = role.section("targets", {})
    return any(targets.section(path).section("hashes").text("sha256") == digest for path in targets.names())
