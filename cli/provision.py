"""Commands that set up a host or a fleet: ``broker-config``, ``doctor``."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Annotated

import typer

from cli import broker_config as broker_files
from cli.broker import find_broker
from cli.output import FAILED, JsonFlag, out, print_json, reported
from edge_runtime import __version__
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ConfigError, LinkError
from trainer.authority import Authority


def broker_config(
    fleet: Annotated[str, typer.Argument(help="The fleet's name.")],
    *,
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the files, which stands in for --prefix.")
    ],
    authority: Annotated[
        Path | None,
        typer.Option(
            "--authority", help="The fleet's authority: its certificate and its list of revoked ones."
        ),
    ] = None,
    prefix: Annotated[
        str, typer.Option(help="Where the files will be on the broker's machine.")
    ] = "/etc/mosquitto",
    data: Annotated[
        str, typer.Option(help="Where the broker keeps what is retained.")
    ] = "/var/lib/mosquitto",
    port: Annotated[int, typer.Option(help="TCP port.", min=1, max=65535)] = 8883,
    address: Annotated[str, typer.Option(help="Address to listen on; all without it.")] = "",
    user: Annotated[str, typer.Option(help="Who the broker runs as when root starts it.")] = "",
) -> None:
    """Write Mosquitto's configuration and the access rules of a fleet, again after every revocation.

    Again with the options of the first time: a configuration that would listen or keep its files elsewhere is refused.
    """
    with reported():
        site = broker_files.Site(
            folder=prefix.rstrip("/"),
            data=data,
            port=port,
            address=address,
            user=user,
            revocations=authority is not None,
        )
        _check_same(folder / "mosquitto.conf", site)
        known = Authority(authority) if authority is not None else None
        for path in broker_files.write(folder, ids.fleet_id(fleet), site, known):
            out.print(f"wrote {path}", markup=False)


def _check_same(path: Path, site: broker_files.Site) -> None:
    """Raises `ConfigError` where a configuration is there that options made, and these options make another."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read ({e}); move it away") from e
    if found := broker_files.differing(text, site):
        told = "; ".join(f"{old or 'nothing'!r} would become {new or 'nothing'!r}" for old, new, _ in found)
        keep = " ".join(options for _, _, options in found)
        raise ConfigError(f"{path}: {told}. To keep what is there: {keep}; to replace it: remove the file")


def doctor(as_json: JsonFlag = False) -> None:
    """Say whether this host has what skiff needs."""
    packages = (
        "numpy",
        "onnxruntime",
        "scikit-learn",
        "skl2onnx",
        "onnx",
        "protobuf",
        "paho-mqtt",
        "tuf",
        "cryptography",
    )
    found = {"skiff": __version__, "python": platform.python_version(), "platform": platform.platform()}
    found |= {name: importlib.metadata.version(name) for name in packages}
    problems = []
    if int(found["protobuf"].partition(".")[0]) >= 7:
        problems.append("protobuf 7 breaks skl2onnx: pip install 'protobuf<7'")
    try:
        found["broker"] = find_broker()[0]
    except LinkError as e:
        problems.append(str(e))
    if as_json:
        print_json({"found": found, "problems": problems})
    else:
        for key, value in found.items():
            out.print(f"{key:14} {value}", markup=False)
        for problem in problems:
            out.print(f"problem: {problem}", style="red", markup=False)
    if problems:
        raise typer.Exit(FAILED)
