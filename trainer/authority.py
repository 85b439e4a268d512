"""A fleet's certificate authority: one folder, which can live on a machine without a network.

``ca.crt`` is what everyone trusts and ``ca.key`` its key; ``index.json`` says which certificates were issued and
which are revoked, ``issued/`` has each by its serial, ``crl.pem`` is the list of revoked ones that the broker reads.
A certificate is in ``issued/`` and then in the index before it leaves, so that every one out there can be revoked;
``crl.pem`` follows from the index and is made again when a crash came between the two. An index that is older than
``issued/`` and ``crl.pem``, from a backup, is completed from them (`trainer.register`). A lock file orders two
processes.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Final, Self

from edge_runtime.contract import ids
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import FleetId
from trainer import certificates, files
from trainer.certificates import EnrolError, Wanted, utc_now
from trainer.register import RESERVED, Entry, Register

__all__ = ["RESERVED", "SERVICES", "Authority", "EnrolError", "Entry", "Issued"]

SERVICES: Final = {
    name: f"{RESERVED}{name}" for name in ("aggregator", "coordinator", "publisher", "labeller", "observer")
}
"""Who else speaks to the broker, and the common name of each."""
BROKER: Final = "skiff broker"
"""The common name of every broker's certificate: with its space it is no name of a device."""
DEFAULT_DAYS: Final = 365
MAX_DAYS: Final = 3650
_README: Final = """\
# Certificate authority of fleet {fleet}

Whoever has `ca.key` can make a device, or a broker, of this fleet. Keep the folder where no network reaches it, and a
backup of it in a safe. `ca.crt` and `crl.pem` are public: the broker and every device have the first, the broker the
second. Copy `crl.pem` to the broker after every revocation (`skiff broker-config` does it).
"""

log = logging.getLogger(__name__)


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
        self.fleet: Final = self._read().fleet

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
            files.write(work / "index.json", Register(fleet=fleet, number=1, entries=()).document())
            work.rename(folder)

    @property
    def certificate(self) -> Path:
        """What everyone in the fleet trusts."""
        return self._folder / "ca.crt"

    def entries(self) -> tuple[Entry, ...]:
        """Every certificate that was issued, in the order of issue."""
        found = self._read()
        found.warn(self._folder)
        return found.entries

    def retired(self) -> tuple[str, ...]:
        """Names of devices and services that had a certificate revoked and have no valid one, in order."""
        now = self._clock()
        named = [entry for entry in self.entries() if entry.kind in ("device", "service")]
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
        with self._changing() as register:
            now, entries = self._clock(), register.entries
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
            self._index(replace(register, entries=(*entries, entry)))
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
        with self._changing() as register:
            entries = register.entries
            named = [entry for entry in entries if entry.name == what and entry.kind in ("device", "service")]
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
                changed = replace(register, number=register.number + 1, entries=after)
                self._index(changed)
                self._list(changed)
            return fresh

    # ── the folder ─────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _changing(self) -> Iterator[Register]:
        """What was issued and revoked, index and list brought up to date, with nobody else at it."""
        with _writing(self._folder), files.locked(self._folder / ".lock"):
            register = self._read()
            if register.found:
                register.warn(self._folder)
                self._index(register)
            if not register.is_listed:
                if not (self._folder / "crl.pem").exists():
                    log.warning("%s: is missing; it is made again from index.json", self._folder / "crl.pem")
                self._list(register)
            yield register

    def _index(self, register: Register) -> None:
        files.write(self._folder / "index.json", register.document())

    def _list(self, register: Register) -> None:
        data = self._authority().revocations(register.revoked, register.number, self._clock())
        files.write(self._folder / "crl.pem", data)

    def _authority(self) -> certificates.Authority:
        try:
            certificate, key = self.certificate.read_bytes(), (self._folder / "ca.key").read_bytes()
        except OSError as e:
            raise EnrolError(
                f"{e.filename}: cannot be read ({e.strerror}); bring the authority's key back"
            ) from e
        return certificates.Authority.load(certificate, key, str(self._folder))

    def _read(self) -> Register:
        with _writing(self._folder):
            return Register.read(self._folder)


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
