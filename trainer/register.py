"""What a fleet's authority has issued and revoked: ``index.json``, checked against ``issued/`` and ``crl.pem``.

The index alone is not believed. It may come from a backup, and then it lacks what was issued and revoked since, while
the certificates in ``issued/`` and the list in ``crl.pem``, each signed by the authority, still know of it. So whatever
they have and the index has not is added to it: nothing that was revoked is ever taken back, and the list's number never
falls.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

from cryptography import x509

from edge_runtime.contract import ids
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import FleetId
from trainer import certificates
from trainer.certificates import EnrolError

RESERVED: Final = "skiff-"
"""Names that begin so are services; no device may have one, or the broker would give it their rights."""
LOST: Final = "lost"
"""The kind of an entry of which only the serial is known: it is revoked, and its certificate is not in ``issued/``."""
KINDS: Final = ("device", "service", "broker", LOST)
_SERIAL: Final = re.compile(r"[0-9a-f]{32}")
_MAX_FILE_BYTES: Final = 1 << 28

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A certificate that was issued: ``serial`` in 32 hexadecimal digits, ``key`` the SHA-256 of its public key."""

    serial: str
    name: str
    kind: str
    hosts: tuple[str, ...]
    key: str
    start: datetime
    end: datetime
    revoked: datetime | None = None

    def state(self, now: datetime) -> str:
        """``valid``, ``expired`` or ``revoked``."""
        if self.revoked is not None:
            return "revoked"
        return "valid" if now < self.end else "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """The number of the list of revoked certificates, and every certificate in the order of issue.

    ``found`` says what the index lacked, a line for each; ``is_listed`` whether ``crl.pem`` says the same.
    """

    fleet: FleetId
    number: int
    entries: tuple[Entry, ...]
    found: tuple[str, ...] = ()
    is_listed: bool = True

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The register in ``folder``, with what the index lacks; raises `EnrolError` and `OSError`, changes nothing."""
        crl = folder / "crl.pem"
        listed = crl.read_bytes() if crl.exists() else None
        issued = {path.stem: path for path in (folder / "issued").glob("*.crt")}
        # Read last: whoever is just revoking has written it before the list.
        index = _read_index(folder)
        try:
            ca = certificates.read_authority((folder / "ca.crt").read_bytes(), str(folder / "ca.crt"))
        except FileNotFoundError as e:
            raise EnrolError(f"{e.filename}: is missing; restore it from its backup") from e
        found: list[str] = []
        entries = _with_issued(index.entries, issued, ca, found)
        if listed is None:
            return cls(
                fleet=index.fleet, number=index.number, entries=entries, found=tuple(found), is_listed=False
            )
        known = certificates.read_list(listed, ca, str(crl))
        entries = _with_revoked(entries, known, found)
        same = set(known.revoked) == {int(e.serial, 16) for e in entries if e.revoked is not None}
        number = max(index.number, known.number + (not same))
        if known.number > index.number:
            found.append(f"the list of revoked certificates was at number {known.number}, not {index.number}")
        return cls(
            fleet=index.fleet,
            number=number,
            entries=entries,
            found=tuple(found),
            is_listed=same and known.number == number,
        )

    def document(self) -> bytes:
        """The bytes of ``index.json``."""
        rows = [_row(entry) for entry in self.entries]
        return json.dumps({"fleet": self.fleet, "list": self.number, "issued": rows}, indent=1).encode()

    @property
    def revoked(self) -> list[certificates.Revoked]:
        """What the list of revoked certificates has to say."""
        return [
            certificates.Revoked(int(e.serial, 16), e.revoked) for e in self.entries if e.revoked is not None
        ]

    def warn(self, folder: Path) -> None:
        """Says, where there is anything to say, what the index lacked."""
        if self.found:
            log.warning(
                "%s is older than what stands beside it (was it restored from a backup?); added from issued/ and "
                "crl.pem: %s",
                folder / "index.json",
                "; ".join(self.found),
            )


def _with_issued(
    entries: Sequence[Entry], issued: Mapping[str, Path], ca: x509.Certificate, found: list[str]
) -> tuple[Entry, ...]:
    """``entries`` with those certificates in ``issued`` that it lacks, or knows by nothing but their serial."""
    lost = {entry.serial: entry for entry in entries if entry.kind == LOST and entry.serial in issued}
    known = {entry.serial for entry in entries} - set(lost)
    more = []
    for serial in sorted(set(issued) - known):
        path = issued[serial]
        wanted, key = certificates.read_issued(path.read_bytes(), ca, str(path))
        if f"{wanted.serial:032x}" != serial:
            raise EnrolError(
                f"{path}: is certificate {wanted.serial:032x}: give it that name, or take it away"
            )
        kind = "broker" if wanted.use == "server" else "device"
        entry = Entry(
            serial=serial,
            name=wanted.name,
            kind="service" if kind == "device" and wanted.name.startswith(RESERVED) else kind,
            hosts=wanted.hosts,
            key=key,
            start=wanted.start,
            end=wanted.end,
            revoked=lost[serial].revoked if serial in lost else None,
        )
        more.append(entry)
        found.append(f"certificate {serial} of {entry.name}")
    more.sort(key=lambda entry: (entry.start, entry.serial))
    return (*(entry for entry in entries if entry.serial not in lost), *more)


def _with_revoked(
    entries: Sequence[Entry], known: certificates.RevocationList, found: list[str]
) -> tuple[Entry, ...]:
    """``entries`` with every revocation in the list."""
    after = {entry.serial: entry for entry in entries}
    for number, at in known.revoked.items():
        serial = f"{number:032x}"
        entry = after.get(serial)
        if entry is None:
            after[serial] = Entry(
                serial=serial, name="?", kind=LOST, hosts=(), key="0" * 64, start=at, end=at, revoked=at
            )
            found.append(
                f"revocation of {serial}, whose name is unknown until issued/{serial}.crt is back: restart the broker "
                "to end its connection"
            )
        elif entry.revoked is None:
            after[serial] = replace(entry, revoked=at)
            found.append(f"revocation of {entry.name} {serial}")
    return tuple(after.values())


# ── index.json ─────────────────────────────────────────────────────────────────────────────────────────


def _read_index(folder: Path) -> Register:
    path = folder / "index.json"
    remedy = "restore it from its backup: what was issued and revoked since is added from issued/ and crl.pem"
    try:
        with path.open("rb") as stream:
            f = Fields(json.loads(stream.read(_MAX_FILE_BYTES)), str(path), EnrolError)
    except FileNotFoundError as e:
        if (folder / "ca.crt").exists():
            raise EnrolError(f"{path}: is missing; {remedy}") from e
        raise EnrolError(f"{folder}: no authority here; make one with skiff pki ca") from e
    except (OSError, ValueError) as e:
        raise EnrolError(f"{path}: cannot be read ({e}); {remedy}") from e
    return Register(
        fleet=FleetId(f.text("fleet", pattern=ids.NAME)),
        number=f.integer("list", low=1),
        entries=tuple(_entry(Fields(item, str(path), EnrolError)) for item in f.items("issued")),
    )


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "serial": entry.serial,
        "name": entry.name,
        "kind": entry.kind,
        "hosts": list(entry.hosts),
        "key": entry.key,
        "start": entry.start.isoformat(),
        "end": entry.end.isoformat(),
        "revoked": entry.revoked.isoformat() if entry.revoked is not None else "",
    }


def _entry(f: Fields) -> Entry:
    def moment(name: str) -> datetime:
        try:
            return datetime.fromisoformat(f.text(name)).astimezone(UTC)
        except ValueError as e:
            raise f.fail(name, f"is no time ({e})") from e

    return Entry(
        serial=f.text("serial", pattern=_SERIAL),
        name=f.text("name"),
        kind=f.text("kind", choices=KINDS),
        hosts=tuple(f.texts("hosts", ())),
        key=f.text("key", pattern=ids.DIGEST),
        start=moment("start"),
        end=moment("end"),
        revoked=moment("revoked") if f.peek("revoked") else None,
    )
