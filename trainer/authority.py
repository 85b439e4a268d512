"""A fleet's certificate authority: one folder, which can live on a machine without a network.

``ca.crt`` is what everyone trusts and ``ca.key`` its key; ``index.json`` says which certificates were issued and
which are revoked, ``issued/`` has each by its serial, ``crl.pem`` is the list of revoked ones that the broker reads.
An entry is in the index before its certificate leaves, so that every certificate out there can be revoked; ``crl.pem``
follows from the index and is made again when a crash came between the two. A lock file orders two processes.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Self

from edge_runtime.contract import ids
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import FleetId
from trainer import certificates, files
from trainer.certificates import EnrolError, Revoked, Wanted, utc_now

__all__ = ["RESERVED", "SERVICES", "Authority", "EnrolError", "Entry", "Issued"]

RESERVED: Final = "skiff-"
"""Names that begin so are services; no device may have one, or the broker would give it their rights."""
SERVICES: Final = {
    name: f"{RESERVED}{name}" for name in ("aggregator", "coordinator", "publisher", "labeller", "observer")
}
"""Who else speaks to the broker, and the common name of each."""
BROKER: Final = "skiff broker"
"""The common name of every broker's certificate: with its space it is no name of a device."""
KINDS: Final = ("device", "service", "broker")
DEFAULT_DAYS: Final = 365
MAX_DAYS: Final = 3650
_SERIAL: Final = re.compile(r"[0-9a-f]{32}")
_MAX_FILE_BYTES: Final = 1 << 28
_README: Final = """\
# Certificate authority of fleet {fleet}

Whoever has `ca.key` can make a device, or a broker, of this fleet. Keep the folder where no network reaches it, and a
backup of it in a safe. `ca.crt` and `crl.pem` are public: the broker and every device have the first, the broker the
second. Copy `crl.pem` to the broker after every revocation (`skiff broker-config` does it).
"""


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
class Issued:
    """A certificate (PEM), and the key (PEM) that was made for it; None where it came from a request."""

    entry: Entry
    certificate: bytes
    key: bytes | None


class Authority:
    """The authority in ``folder``; raises `EnrolError` when there is none. ``clock`` gives UTC time."""

    def __init__(self, folder: Path, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._folder = folder
        self._clock = clock
        self.fleet: Final = self._read()[0]

    @classmethod
    def create(cls, folder: Path, fleet: FleetId, *, clock: Callable[[], datetime] = utc_now) -> Self:
        """Opens the authority in ``folder``, made if the folder is missing or empty; raises `EnrolError`."""
        with _writing(folder):
            cls._make(folder, fleet, clock())
        found = cls(folder, clock=clock)
        if found.fleet != fleet:
            raise EnrolError(
                f"{folder}: is the authority of fleet {found.fleet}, not of {fleet}: take another folder"
            )
        return found

    @staticmethod
    def _make(folder: Path, fleet: FleetId, now: datetime) -> None:
        if not folder.exists() or not any(folder.iterdir()):
            made = certificates.Authority.make(fleet, now)
            work = folder.with_name(f".{folder.name}.new")
            work.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.write(work / "ca.key", certificates.private_bytes(made.key), mode=0o600)
            files.write(work / "ca.crt", made.pem)
            files.write(work / "crl.pem", made.revocations((), 1, now))
            files.write(work / "README.md", _README.format(fleet=fleet).encode())
            files.write(work / "index.json", _index(fleet, 1, ()))
            work.rename(folder)

    @property
    def certificate(self) -> Path:
        """What everyone in the fleet trusts."""
        return self._folder / "ca.crt"

    def entries(self) -> tuple[Entry, ...]:
        """Every certificate that was issued, in the order of issue."""
        return self._read()[2]

    def retired(self) -> tuple[str, ...]:
        """Names of devices and services that had a certificate revoked and have no valid one, in order."""
        now = self._clock()
        named = [entry for entry in self.entries() if entry.kind != "broker"]
        revoked = {entry.name for entry in named if entry.revoked is not None}
        return tuple(sorted(revoked - {entry.name for entry in named if entry.state(now) == "valid"}))

    def revocations(self) -> bytes:
        """The list of revoked certificates (PEM), brought up to date."""
        with self._changing():
            return (self._folder / "crl.pem").read_bytes()

    # ── issuing ────────────────────────────────────────────────────────────────────────────────────────

    def device(
        self, name: str, *, request: Path | None = None, days: int = DEFAULT_DAYS, renew: bool = False
    ) -> Issued:
        """A device's certificate, for the key in its ``request`` or for a new one; raises `EnrolError`.

        ``renew``: a further one, and the earlier stay valid, for a device needs the old one until it has the new.
        """
        try:
            ids.device_id(name)
        except ContractError as e:
            raise EnrolError(str(e)) from e
        if name.startswith(RESERVED):
            raise EnrolError(
                f"{name!r} is no name for a device: {RESERVED}… are services, with rights of their own"
            )
        return self._issue("device", name, (), request, days, renew=renew)

    def service(
        self, which: str, *, request: Path | None = None, days: int = DEFAULT_DAYS, renew: bool = False
    ) -> Issued:
        """The certificate of one of `SERVICES`; otherwise like `device`."""
        if which not in SERVICES:
            raise EnrolError(f"{which!r} is no service: it is one of {', '.join(SERVICES)}")
        return self._issue("service", SERVICES[which], (), request, days, renew=renew)

    def broker(
        self, hosts: Sequence[str], *, request: Path | None = None, days: int = DEFAULT_DAYS
    ) -> Issued:
        """A broker's certificate; ``hosts`` are the names and addresses that devices call it by."""
        if not hosts:
            raise EnrolError(
                "a broker's certificate names the hosts that devices call it by: give one or more"
            )
        names = tuple(dict.fromkeys(certificates.host_name(host) for host in hosts))
        return self._issue("broker", BROKER, names, request, days, renew=None)

    def _issue(
        self,
        kind: str,
        name: str,
        hosts: tuple[str, ...],
        request: Path | None,
        days: int,
        *,
        renew: bool | None,
    ) -> Issued:
        if not 1 <= days <= MAX_DAYS:
            raise EnrolError(f"{days} days are outside [1, {MAX_DAYS}]")
        made = None if request is not None else certificates.new_key()
        public = made.public_key() if made is not None else _requested(request, name)
        with self._changing() as (number, entries):
            now = self._clock()
            key = sha256(certificates.public_bytes(public)).hexdigest()
            self._refuse(entries, kind, name, key, renew=renew)
            authority = self._authority()
            serial = next(
                s for s in iter(certificates.new_serial, None) if f"{s:032x}" not in _serials(entries)
            )
            wanted = Wanted(
                name=name,
                use="server" if kind == "broker" else "client",
                serial=serial,
                start=now - certificates.BACKDATED,
                end=min(now + timedelta(days=days), authority.certificate.not_valid_after_utc),
                hosts=hosts,
            )
            entry = Entry(
                serial=f"{serial:032x}",
                name=name,
                kind=kind,
                hosts=hosts,
                key=key,
                start=wanted.start,
                end=wanted.end,
            )
            certificate = authority.issue(wanted, public)
            files.write(self._folder / "issued" / f"{entry.serial}.crt", certificate)
            files.write(self._folder / "index.json", _index(self.fleet, number, (*entries, entry)))
        private = None if made is None else certificates.private_bytes(made)
        return Issued(entry=entry, certificate=certificate, key=private)

    def _refuse(
        self, entries: Sequence[Entry], kind: str, name: str, key: str, *, renew: bool | None
    ) -> None:
        """Raises `EnrolError` where another certificate of ``name``, or for this key, would be a mistake."""
        now = self._clock()
        for entry in entries:
            if entry.key == key and (entry.name, entry.kind) != (name, kind):
                raise EnrolError(
                    f"{name}: its key is that of {entry.name}: each one makes its own; make a new key"
                )
            if entry.key == key and entry.revoked is not None:
                raise EnrolError(f"{name}: the certificate with this key was revoked; make a new key")
        if renew is None:
            return
        own = [entry for entry in entries if entry.name == name]
        valid = [entry for entry in own if entry.state(now) == "valid"]
        if renew and not own:
            raise EnrolError(f"{name}: was never enrolled, so there is nothing to renew")
        if renew and all(entry.revoked is not None for entry in own):
            raise EnrolError(
                f"{name}: was revoked; enrol it anew, without renewing, if that is what you want"
            )
        if not renew and valid:
            raise EnrolError(
                f"{name}: has a certificate, {valid[-1].serial}, valid until {valid[-1].end:%Y-%m-%d}: renew it, or "
                "revoke it first if this is another machine"
            )

    # ── revoking ───────────────────────────────────────────────────────────────────────────────────────

    def revoke(self, what: str) -> tuple[Entry, ...]:
        """Revokes every certificate of the device or service ``what``, or the one with that serial.

        Returns those that were not revoked before. Raises `EnrolError` when there is none such.
        """
        with self._changing() as (number, entries):
            named = [entry for entry in entries if entry.name == what and entry.kind != "broker"]
            meant = named or [entry for entry in entries if entry.serial == what.lower().replace(":", "")]
            if not meant:
                raise EnrolError(f"{what!r}: no certificate of that name or serial was issued here")
            if meant[0].kind == "broker":
                raise EnrolError(
                    f"{what}: is a broker's. Devices read no list of revoked certificates: give the broker's name to "
                    "another machine, or move the fleet to a new authority"
                )
            fresh = tuple(replace(e, revoked=self._clock()) for e in meant if e.revoked is None)
            if fresh:
                by_serial = {entry.serial: entry for entry in fresh}
                after = tuple(by_serial.get(entry.serial, entry) for entry in entries)
                files.write(self._folder / "index.json", _index(self.fleet, number + 1, after))
                self._list(number + 1, after)
            return fresh

    # ── the folder ─────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _changing(self) -> Iterator[tuple[int, tuple[Entry, ...]]]:
        """The number of the revocation list and the index, with nobody else at it."""
        with _writing(self._folder), files.locked(self._folder / ".lock"):
            _, number, entries = self._read()
            path = self._folder / "crl.pem"
            if not path.exists() or certificates.list_number(path.read_bytes()) != number:
                self._list(number, entries)
            yield number, entries

    def _list(self, number: int, entries: Sequence[Entry]) -> None:
        revoked = [Revoked(int(e.serial, 16), e.revoked) for e in entries if e.revoked is not None]
        files.write(self._folder / "crl.pem", self._authority().revocations(revoked, number, self._clock()))

    def _authority(self) -> certificates.Authority:
        try:
            certificate, key = self.certificate.read_bytes(), (self._folder / "ca.key").read_bytes()
        except OSError as e:
            raise EnrolError(
                f"{e.filename}: cannot be read ({e.strerror}); bring the authority's key back"
            ) from e
        return certificates.Authority.load(certificate, key, str(self._folder))

    def _read(self) -> tuple[FleetId, int, tuple[Entry, ...]]:
        path = self._folder / "index.json"
        try:
            with path.open("rb") as stream:
                f = Fields(json.loads(stream.read(_MAX_FILE_BYTES)), str(path), EnrolError)
        except FileNotFoundError as e:
            raise EnrolError(f"{self._folder}: no authority here; make one with skiff pki ca") from e
        except (OSError, ValueError) as e:
            raise EnrolError(f"{path}: cannot be read ({e}); restore it from its backup") from e
        entries = tuple(_entry(Fields(item, str(path), EnrolError)) for item in f.items("issued"))
        return FleetId(f.text("fleet", pattern=ids.NAME)), f.integer("list", low=1), entries


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Translates what the disk refuses."""
    try:
        yield
    except OSError as e:
        raise EnrolError(f"{e.filename or folder}: {e.strerror}; mend that and run the command again") from e


def _requested(request: Path | None, name: str) -> certificates.PublicKey:
    assert request is not None
    try:
        data = request.read_bytes()
    except OSError as e:
        raise EnrolError(f"{request}: cannot be read ({e.strerror})") from e
    return certificates.read_request(data, name, str(request))


def _serials(entries: Sequence[Entry]) -> set[str]:
    return {entry.serial for entry in entries}


def _index(fleet: FleetId, number: int, entries: Sequence[Entry]) -> bytes:
    def row(entry: Entry) -> dict[str, Any]:
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

    return json.dumps(
        {"fleet": fleet, "list": number, "issued": [row(e) for e in entries]}, indent=1
    ).encode()


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
