"""`skiff broker-config`: Mosquitto's configuration and access rules for a fleet, from the contract's topics."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import CohortId, DeviceId, Digest, FleetId, ModelName, SourceId
from edge_runtime.contract.topics import Topics
from trainer import files
from trainer.authority import SERVICES, Authority

AGGREGATOR: Final = SERVICES["aggregator"]
COORDINATOR: Final = SERVICES["coordinator"]
PUBLISHER: Final = SERVICES["publisher"]
LABELLER: Final = SERVICES["labeller"]
OBSERVER: Final = SERVICES["observer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where the broker runs: its ``folder`` of configuration, its ``data``, and what it listens on.

    ``address`` empty: every interface; ``user`` empty: Mosquitto's own, when root starts it. ``revocations``: whether
    there is a list of revoked certificates.
    """

    folder: str = "/etc/mosquitto"
    data: str = "/var/lib/mosquitto"
    port: int = 8883
    address: str = ""
    user: str = ""
    revocations: bool = True


def mosquitto_conf(site: Site) -> str:
    """Mosquitto's configuration; raises `ConfigError` when a text of ``site`` cannot stand in it."""
    for text in (site.folder, site.data, site.address, site.user):
        if not text.isprintable():
            raise ConfigError(f"{text!r} cannot stand in mosquitto.conf: it holds a line break or the like")
    certs = f"{site.folder}/certs"
    lines = [
        "# Mosquitto for a skiff fleet: mutual TLS, the certificate's common name is the user name.",
        "per_listener_settings false",
        *([f"user {site.user}"] if site.user else []),
        f"listener {site.port} {site.address}".rstrip(),
        f"cafile {certs}/ca.crt",
        f"certfile {certs}/server.crt",
        f"keyfile {certs}/server.key",
        "# The list of revoked certificates, and the access rules, are read again on SIGHUP.",
        *([f"crlfile {certs}/crl.pem"] if site.revocations else []),
        "tls_version tlsv1.2",
        "require_certificate true",
        "use_identity_as_username true",
        "allow_anonymous false",
        f"acl_file {site.folder}/skiff.acl",
        "",
        "# Retained releases, metadata and model chunks survive a restart.",
        "persistence true",
        f"persistence_location {site.data.rstrip('/')}/",
        "autosave_interval 60",
        "# Without it a chunk of a model takes 44 ms instead of 0.02 ms.",
        "set_tcp_nodelay true",
        "message_size_limit 1048576",
    ]
    return "\n".join(lines) + "\n"


def differing(text: str, site: Site) -> list[tuple[str, str, str]]:
    """Where ``text``, an earlier configuration, listens or keeps its files elsewhere than ``site`` says.

    Each as (its line, the line for ``site``, the options that keep its line); a line that is not there is "".
    """
    before, after = _directives(text), _directives(mosquitto_conf(site))
    found = []
    for word, keep in _KEEPING.items():
        old, new = (directives.get(word, "") for directives in (before, after))
        if old != new and (old or word != "crlfile"):
            found.append((f"{word} {old}" if old else "", f"{word} {new}" if new else "", keep(old)))
    return found


def _directives(text: str) -> dict[str, str]:
    lines = (line.partition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {word: rest.strip() for word, _, rest in lines if word}


def _listener(rest: str) -> str:
    port, _, address = rest.partition(" ")
    return f"--port {port}" + (f" --address {address}" if address else "")


_KEEPING: Final[Mapping[str, Callable[[str], str]]] = {
    "listener": _listener,
    "acl_file": lambda path: f"--prefix {path.removesuffix('/skiff.acl')}",
    "persistence_location": lambda path: f"--data {path}",
    "user": lambda user: f"--user {user}".strip() if user else "no --user",
    "crlfile": lambda _: "--authority FOLDER",
}
"""Directives that options decide, and the options that leave them as they are."""


def acl(fleet: FleetId, revoked: Iterable[str] = ()) -> str:
    """Access rules: a device writes only under its own name; only the coordinator writes releases, only the labeller
    tells labels. The names in ``revoked`` may do nothing, also on connections that are still open.
    """
    t = Topics(fleet)
    me, model = DeviceId("%u"), ModelName("+")
    release = t.release(CohortId("+"), model)
    trust = t.trust(1).removesuffix("1") + "+"
    chunk = t.chunk(Digest("+"), 0).removesuffix("0") + "+"
    every, source = DeviceId("+"), SourceId("+")
    whole = t.alarm().removesuffix("alarm") + "#"
    lines = [
        f"# Topics of fleet {fleet}. %u is the certificate's common name, which is the device's name.",
        *(f"pattern write {topic}" for topic in (t.status(me), t.window(me, model), t.event(me))),
        *(f"pattern read {topic}" for topic in (t.ack(me), t.command(me))),
        *(f"pattern read {topic}" for topic in (release, trust, chunk)),
        "",
        f"user {AGGREGATOR}",
        *(f"topic read {t.every(what)}" for what in ("status", "window", "event", "labels")),
        f"topic write {t.ack(every)}",
        f"topic write {t.labels_ack(source)}",
        f"topic write {t.alarm()}",
        "",
        f"user {COORDINATOR}",
        f"topic write {release}",
        f"topic write {t.command(every)}",
        "",
        f"user {PUBLISHER}",
        f"topic write {trust}",
        f"topic write {chunk}",
        "",
        "# Whoever tells what was right, of any device: never a device itself, which could make any model look good.",
        f"user {LABELLER}",
        f"topic write {t.labels(source)}",
        f"topic read {t.labels_ack(source)}",
        "",
        "# Whoever watches, alarms for example, and changes nothing.",
        f"user {OBSERVER}",
        f"topic read {whole}",
        *(line for name in revoked for line in ("", f"user {name}", f"topic deny {whole}")),
    ]
    return "\n".join(lines) + "\n"


def write(out: Path, fleet: FleetId, site: Site, authority: Authority | None = None) -> tuple[Path, ...]:
    """Writes what belongs into ``site.folder`` to ``out``; the authority's own files only where one is given.

    Raises `ConfigError` when ``authority`` is another fleet's, and what `mosquitto_conf` raises.
    """
    if authority is not None and authority.fleet != fleet:
        raise ConfigError(f"the authority is that of fleet {authority.fleet}, not of {fleet}")
    contents = {
        out / "mosquitto.conf": mosquitto_conf(site).encode(),
        out / "skiff.acl": acl(fleet, authority.retired() if authority else ()).encode(),
    }
    if authority is not None:
        contents[out / "certs" / "ca.crt"] = authority.certificate.read_bytes()
        contents[out / "certs" / "crl.pem"] = authority.revocations()
    for path, data in contents.items():
        files.write(path, data)
    return tuple(contents)
