"""Commands of `skiff pki` about certificates: who may speak to the broker of a fleet, and as whom."""

from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Annotated, Final

import typer

from cli.output import JsonFlag, note, out, print_json, reported
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.fields import nearest
from trainer import files
from trainer.authority import DEFAULT_DAYS, SERVICES, Authority, Issued
from trainer.certificates import host_name, utc_now

FolderArgument = Annotated[Path, typer.Argument(help="Folder of the certificate authority.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for the files to be taken there.")]
DaysOption = Annotated[int, typer.Option(help="Days that the certificate is valid.")]
RequestOption = Annotated[
    Path | None, typer.Option("--csr", help="A certificate request: the private key stays where it was made.")
]
RenewOption = Annotated[
    bool, typer.Option("--renew", help="Another certificate; the earlier ones stay valid.")
]
TLS_PORT: Final = 8883


def ca(
    folder: Annotated[Path, typer.Argument(help="Where the authority stands or is to stand.")],
    fleet: Annotated[str, typer.Option(help="The fleet's name.")],
) -> None:
    """Make a fleet's certificate authority. It needs no network; keep it offline."""
    with reported():
        found = Authority.create(folder, ids.fleet_id(fleet))
        out.print(f"{found.certificate}  everyone in fleet {found.fleet} trusts it", markup=False)
        out.print(f"{folder / 'ca.key'}  keep it offline: who has it can make any device", markup=False)


def server(
    folder: FolderArgument,
    hosts: Annotated[list[str], typer.Argument(help="Names and addresses that devices call the broker by.")],
    *,
    out_dir: OutOption,
    csr: RequestOption = None,
    days: DaysOption = DEFAULT_DAYS,
    renew: RenewOption = False,
) -> None:
    """Issue the broker's certificate: server.crt and server.key."""
    with reported():
        names = _targets(out_dir, "server", csr, renew=renew)
        issued = Authority(folder).broker(hosts, request=csr, days=days)
        _written(_pair(names, issued))


def device(
    folder: FolderArgument,
    device_id: Annotated[str, typer.Argument(help="The device's id, which the broker knows it by.")],
    *,
    out_dir: OutOption,
    csr: RequestOption = None,
    days: DaysOption = DEFAULT_DAYS,
    renew: RenewOption = False,
    repository: Annotated[
        Path | None, typer.Option("--repository", "-r", help="Put its first root beside, as root.json.")
    ] = None,
    broker: Annotated[str, typer.Option(help="HOST[:PORT] of the broker: write skiffd.toml, too.")] = "",
    model: Annotated[str, typer.Option(help="The model family, for skiffd.toml.")] = "",
    hardware: Annotated[str, typer.Option(help="A class of device_configs/, for skiffd.toml.")] = "",
) -> None:
    """Enrol a device, or renew its certificate: device.crt, ca.crt, and device.key unless a request was given."""
    with reported():
        names = _targets(out_dir, "device", csr, renew=renew)
        authority = Authority(folder)
        more = {out_dir / "ca.crt": authority.certificate.read_bytes()}
        if repository is not None:
            more[out_dir / "root.json"] = _pinned(repository)
        if broker:
            wanted = {"--model": model, "--repository": repository}
            if missing := [name for name, value in wanted.items() if not value]:
                raise ConfigError(f"{' and '.join(missing)} missing: skiffd.toml names them")
            text = _skiffd(authority, device_id, broker, model, hardware)
            more |= {out_dir / "skiffd.toml": text} | _hardware(out_dir, hardware)
        shut_out = device_id in authority.retired()
        issued = authority.device(device_id, request=csr, days=days, renew=renew)
        _written(_pair(names, issued) | more)
        if shut_out:
            note(
                f"{device_id} was revoked, and its name is denied everything until then: {_counts(authority, folder)}"
            )
        if renew:
            note(
                "the earlier certificates stay valid until they expire or `skiff pki revoke-device` names their serial"
            )


def service(
    folder: FolderArgument,
    which: Annotated[str, typer.Argument(help=f"One of {', '.join(SERVICES)}.")],
    *,
    out_dir: OutOption,
    csr: RequestOption = None,
    days: DaysOption = DEFAULT_DAYS,
    renew: RenewOption = False,
) -> None:
    """Issue the certificate of a service of the fleet, such as the aggregator's."""
    with reported():
        names = _targets(out_dir, SERVICES.get(which, which), csr, renew=renew)
        authority = Authority(folder)
        shut_out = SERVICES.get(which, which) in authority.retired()
        issued = authority.service(which, request=csr, days=days, renew=renew)
        _written(_pair(names, issued) | {out_dir / "ca.crt": authority.certificate.read_bytes()})
        if shut_out:
            note(f"{which} was revoked, and is denied everything until then: {_counts(authority, folder)}")


def devices(folder: FolderArgument, as_json: JsonFlag = False) -> None:
    """List every certificate that was issued: whose, until when, and whether it is revoked."""
    with reported():
        entries = Authority(folder).entries()
    now = utc_now()
    if as_json:
        print_json({"certificates": [asdict(entry) | {"state": entry.state(now)} for entry in entries]})
        return
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        hosts = f"  {' '.join(entry.hosts)}" if entry.hosts else ""
        state = f"revoked {entry.revoked:%Y-%m-%d}" if entry.revoked else entry.state(now)
        out.print(
            f"{entry.name:{width}}  {entry.kind:7}  {entry.serial}  until {entry.end:%Y-%m-%d}  {state}{hosts}",
            markup=False,
        )


def revoke_device(
    folder: FolderArgument,
    what: Annotated[
        str, typer.Argument(help="A device, a service (skiff-…), or the serial of one certificate.")
    ],
) -> None:
    """Revoke all certificates of a device or service, or the one with this serial."""
    with reported():
        authority = Authority(folder)
        revoked = authority.revoke(what)
        for entry in revoked:
            out.print(f"revoked {entry.name} {entry.serial}", markup=False)
        if not revoked:
            note(f"{what} was revoked before")
        note(_counts(authority, folder))


def _counts(authority: Authority, folder: Path) -> str:
    return (
        "it counts once the broker has read it: skiff broker-config "
        f"{authority.fleet} --authority {folder} --out …, with the options of the first time, copy the files there, "
        "and reload Mosquitto"
    )


# ── files ──────────────────────────────────────────────────────────────────────────────────────────────


def _targets(out_dir: Path, stem: str, csr: Path | None, *, renew: bool) -> tuple[Path, Path]:
    """Where certificate and key go; raises `ConfigError` when one is there, for it may be the only copy of its key."""
    names = out_dir / f"{stem}.crt", out_dir / f"{stem}.key"
    if found := [path for path in names[: 1 if csr else 2] if path.exists() and not renew]:
        raise ConfigError(f"{found[0]} is there already: take another folder, or --renew to replace it")
    return names


def _pair(names: tuple[Path, Path], issued: Issued) -> dict[Path, bytes]:
    key = {names[1]: issued.key} if issued.key is not None else {}
    return key | {names[0]: issued.certificate}


def _written(contents: Mapping[Path, bytes]) -> None:
    for path, data in contents.items():
        secret = path.suffix == ".key"
        try:
            files.write(path, data, mode=0o600 if secret else 0o644)
        except OSError as e:
            raise ConfigError(
                f"{path}: cannot be written ({e.strerror}); run the command again with --renew"
            ) from e
        out.print(
            f"wrote {path}" + ("  (private: bring it there and delete it here)" if secret else ""),
            markup=False,
        )


def _pinned(repository: Path) -> bytes:
    from trainer.publish import Repository

    return Repository(repository, look=True).first_root()


def _hardware(out_dir: Path, hardware: str) -> dict[Path, bytes]:
    """The file of a hardware class, to stand beside skiffd.toml; raises `ConfigError` when there is none such."""
    if not hardware:
        return {}
    folder = resources.files("device_configs")
    known = sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))
    if hardware not in known:
        raise ConfigError(
            f"no hardware class {hardware!r}{nearest(hardware, known)}: there are {', '.join(known)}"
        )
    return {out_dir / f"{hardware}.toml": (folder / f"{hardware}.toml").read_bytes()}


def _skiffd(authority: Authority, device_id: str, broker: str, model: str, hardware: str) -> bytes:
    """The device's own part of its configuration; paths are relative to the file."""
    host, _, port = broker.partition(":") if broker.count(":") == 1 else (broker, "", "")
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"{broker!r}: {port!r} is no TCP port")
    lines = [
        *([f'base = "{hardware}.toml"', ""] if hardware else []),
        "[device]",
        f'id = "{ids.device_id(device_id)}"',
        f'fleet = "{authority.fleet}"',
        *([] if hardware else ['state_dir = "/var/lib/skiffd"']),
        "",
        "[broker]",
        f'host = "{host_name(host)}"',
        f"port = {port or TLS_PORT}",
        'tls = { ca = "ca.crt", certificate = "device.crt", key = "device.key" }',
        "",
        "[model]",
        f'name = "{ids.model_name(model)}"',
        'trust_root = "root.json"',
    ]
    return ("\n".join(lines) + "\n").encode()
