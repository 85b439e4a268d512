"""Commands that set up a host or a fleet: ``pki``, ``broker-config``, ``doctor``."""

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
from edge_runtime.contract.errors import LinkError
from trainer.publish import Repository


def pki(
    repository: Annotated[Path, typer.Argument(help="Where the repository stands or is to stand.")],
    auto: Annotated[str, typer.Option(help="Let the builder key publish this model family on its own.")] = "",
) -> None:
    """Make the signing keys on first use, and say which have to go offline."""
    with reported():
        found = Repository.create(repository)
        if auto:
            found.enable_auto(ids.model_name(auto))
        out.print(f"keys        {repository / 'keys'} (its README says which belong offline)", markup=False)
        out.print(f"pinned root {found.pinned_root} (devices are provisioned with it)", markup=False)
        for role, moment in sorted(found.expiries().items()):
            out.print(f"{role:11} expires {moment:%Y-%m-%d}", markup=False)


def broker_config(
    fleet: Annotated[str, typer.Argument(help="The fleet's name.")],
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for mosquitto.conf and skiff.acl.")],
) -> None:
    """Write Mosquitto's configuration and the access rules of a fleet."""
    with reported():
        name = ids.fleet_id(fleet)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mosquitto.conf").write_text(broker_files.MOSQUITTO_CONF, encoding="utf-8")
        (folder / "skiff.acl").write_text(broker_files.acl(name), encoding="utf-8")
        out.print(f"wrote {folder / 'mosquitto.conf'} and {folder / 'skiff.acl'}", markup=False)


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
