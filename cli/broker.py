"""A broker of one's own on loopback: Mosquitto where it is installed, else the embedded one from a wheel."""

import getpass
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_runtime.contract.errors import LinkError

HOST: Final = "127.0.0.1"
# Debian installs the broker where an ordinary user's PATH does not look.
_MORE_FOLDERS: Final = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")


@dataclass(frozen=True, slots=True)
class BrokerCommand:
    """How to start a broker: its name for people, the command line, and the port it will listen on."""

    name: str
    command: tuple[str, ...]
    port: int


def free_port() -> int:
    """A loopback TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def find_broker(*, embedded: bool = False) -> tuple[str, str]:
    """Name and path of the broker to use; raises `LinkError` when there is none.

    ``embedded`` takes the wheel's broker even where Mosquitto is installed.
    """
    path = os.pathsep.join((os.environ.get("PATH", ""), *_MORE_FOLDERS))
    mosquitto = None if embedded else shutil.which("mosquitto", path=path)
    if mosquitto is not None:
        return "Mosquitto", mosquitto
    nats = shutil.which("nats-server", path=os.pathsep.join((str(Path(sys.executable).parent), path)))
    if nats is None:
        raise LinkError(
            "no broker found: install mosquitto, or pip install 'skiff-edge[host]' for the embedded one"
        )
    return "NATS (embedded)", nats


def prepare_broker(folder: Path, *, embedded: bool = False) -> BrokerCommand:
    """Writes a configuration into ``folder`` and returns the command that starts the broker; see `find_broker`."""
    folder.mkdir(parents=True, exist_ok=True)
    name, binary = find_broker(embedded=embedded)
    configure = _mosquitto if name == "Mosquitto" else _nats
    port = free_port()
    return BrokerCommand(name, (binary, "-c", str(configure(folder, port))), port)


def _mosquitto(folder: Path, port: int) -> Path:
    config = folder / "mosquitto.conf"
    config.write_text(
        f"listener {port} {HOST}\n"
        f"user {getpass.getuser()}\n"
        "allow_anonymous true\n"
        "set_tcp_nodelay true\n"
        "persistence true\n"
        f"persistence_location {folder}/\n"
        "autosave_interval 5\n"
        "max_queued_messages 0\n"
        "message_size_limit 1048576\n",
        encoding="utf-8",
    )
    return config


def _nats(folder: Path, port: int) -> Path:
    config = folder / "nats.conf"
    config.write_text(
        'server_name: "skiff"\n'
        f'host: "{HOST}"\n'
        "port: -1\n"
        f'jetstream {{ store_dir: "{folder / "jetstream"}", max_file_store: 1GB, max_memory_store: 64MB }}\n'
        f'mqtt {{ listen: "{HOST}:{port}", ack_wait: "5s", max_ack_pending: 1000 }}\n',
        encoding="utf-8",
    )
    return config


def wait_for_port(port: int, alive: Callable[[], bool], *, timeout_seconds: float = 15.0) -> None:
    """Returns when the loopback ``port`` accepts; raises `LinkError` when it does not, or the broker is not alive."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            with socket.create_connection((HOST, port), timeout=1.0):
                return
        except OSError as e:
            if not alive():
                raise LinkError("the broker ended while it started; see its log in the work folder") from e
            if time.monotonic() > deadline:
                raise LinkError(
                    f"the broker does not accept on port {port} after {timeout_seconds:.0f} s"
                ) from e
        time.sleep(0.02)
