"""Environments of peers that cannot live in ours: made on demand, with the versions of ``peer_environments``."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "skiff" / "drift-peers"
OURS: Final = ("aggregator", "edge_runtime")
"""What no answer of a peer depends on, though the simulator that makes its rows imports it."""
INSTALL_SECONDS: Final = 1800
RUN_SECONDS: Final = 7200


def environment(peer: str, cache: Path) -> Path | str:
    """The Python of the peer's own environment, made where it is missing or its pins changed; or why there is none."""
    pins = HERE / "peer_environments" / f"{peer}.txt"
    wanted = hashlib.sha256(pins.read_bytes()).hexdigest()
    folder = cache / peer
    stamp, python = folder / "pins.sha256", folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text(encoding="ascii") == wanted:
        return python
    print(f"... installing {peer} in {folder}", file=sys.stderr)
    try:
        venv.create(folder, with_pip=True, clear=True)
        install = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-r",
            str(pins),
        ]
        subprocess.run(install, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.CalledProcessError as e:
        text = e.stderr if isinstance(e.stderr, str) else ""
        errors = [line for line in text.splitlines() if line.startswith("ERROR")]
        return f"not installed: {(errors or text.splitlines() or [str(e)])[-1]}"
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"not installed: {e}"
    stamp.write_text(wanted, encoding="ascii")
    return python


def ask(python: Path | str, peer: str, folder: Path, names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """What the peer says of each fleet in ``folder``, or of ``names``, as it says it; RuntimeError where it fails."""
    command = [str(python), str(HERE / "drift_peer_child.py"), peer, str(folder), *names]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
            assert child.stdout is not None
            watchdog = threading.Timer(RUN_SECONDS, child.kill)
            watchdog.start()
            try:
                for line in child.stdout:
                    yield json.loads(line)
            finally:
                watchdog.cancel()
                child.stdout.close()
                child.wait()
        if child.returncode:
            errors.seek(0)
            raise RuntimeError(f"{peer} failed: {(errors.read().splitlines() or ['no output'])[-1]}")
