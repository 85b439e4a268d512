"""``skiffd CONFIG.toml``: the device's command. Without an option it serves until it is told to stop."""

import gc
import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from edge_runtime import __version__
from edge_runtime.adapters.logs import log_to_stderr
from edge_runtime.config import DaemonConfig, load
from edge_runtime.contract.errors import ConfigError, SkiffError

EXIT_FAILED: Final = 1
EXIT_CONFIG: Final = 2
SWITCH_SECONDS: Final = 0.0001
"""How long a thread may hold the interpreter while a row waits; each row that comes while a model is loaded waits so
long once or twice."""

log = logging.getLogger("skiffd")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``skiffd``: 0 after a clean stop, 1 when it cannot go on or a check fails, 2 for a bad file."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 1 and not argv[0].startswith("-"):
        return _run(argv[0], _serve)  # argparse would stay in memory: 1 MB
    return _ask(argv)


def _ask(argv: Sequence[str]) -> int:
    import argparse  # noqa: PLC0415 (see above)

    parser = argparse.ArgumentParser(
        prog="skiffd", description="Serve, watch and update one model on this device."
    )
    parser.add_argument("config", type=Path, help="TOML file; see device_configs/ for examples")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--check", action="store_true", help="say what is wrong with this device before it goes out, and exit"
    )
    what.add_argument("--status", action="store_true", help="print what the running skiffd says of itself")
    parser.add_argument("--json", action="store_true", help="with --check or --status: print JSON")
    parser.add_argument("--offline", action="store_true", help="with --check: ask no broker")
    parser.add_argument("--version", action="version", version=f"skiffd {__version__}")
    given = parser.parse_args(argv)
    if given.offline and not given.check:
        parser.error("--offline belongs to --check")
    if given.json and not (given.check or given.status):
        parser.error("--json belongs to --check or --status")
    if given.check:
        return _run(given.config, lambda config: _check(config, as_json=given.json, offline=given.offline))
    if given.status:
        return _run(given.config, lambda config: _print_status(config, as_json=given.json))
    return _run(given.config, _serve)


def _run(path: Path | str, work: Callable[[DaemonConfig], int]) -> int:
    try:
        config = load(path)
    except ConfigError as e:
        sys.stderr.write(f"skiffd: {e}\n")
        return EXIT_CONFIG
    return work(config)


def _check(config: DaemonConfig, *, as_json: bool, offline: bool) -> int:
    from edge_runtime import check  # noqa: PLC0415 (the daemon does not pay for it)

    return check.main(config, as_json=as_json, offline=offline)


def _print_status(config: DaemonConfig, *, as_json: bool) -> int:
    import json  # noqa: PLC0415 (likewise)

    from edge_runtime.adapters import status_report, status_socket  # noqa: PLC0415 (likewise)

    try:
        document = status_socket.read_status(config.status_socket)
    except SkiffError as e:
        sys.stderr.write(f"skiffd: {e}\n")
        return EXIT_FAILED
    sys.stdout.write(json.dumps(document, indent=2) + "\n" if as_json else status_report.render(document))
    return 0


def _serve(config: DaemonConfig) -> int:
    from edge_runtime.daemon import Daemon  # noqa: PLC0415 (loads ONNX Runtime, which the rest does without)

    log_to_stderr(config.device)
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.freeze()  # a full collection of the modules' objects takes ten milliseconds, in which no row is answered
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        daemon = Daemon(config)
    except SkiffError as e:
        sys.stderr.write(f"skiffd: {e}\n")
        return EXIT_CONFIG
    try:
        daemon.run(stop)
    except SkiffError as e:
        log.critical("gave_up reason=%s", e)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
