"""A real PostgreSQL for tests: one cluster on a Unix socket in a temporary folder, one new database per test."""

import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.services import POLL_SECONDS, START_TIMEOUT_SECONDS, STOP_TIMEOUT_SECONDS, ServiceError

PORT = 5432  # names the socket only; nothing listens on TCP


def find_postgres() -> Path | None:
    """The newest PostgreSQL's folder of programs, or None. Debian keeps them where no PATH looks."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: float(p.parent.parent.name)
    )
    on_path = shutil.which("postgres")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


class Postgres:
    """A cluster in ``folder``. PostgreSQL refuses to run as root: then it runs as the package's own user."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self._data = folder / "data"
        self._made = 0
        account = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
        self._user = account.pw_uid if account is not None else None
        self._group = account.pw_gid if account is not None else None
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)
        if account is not None:
            os.chown(folder, account.pw_uid, account.pw_gid)
        self._run(
            "initdb",
            "-D",
            str(self._data),
            "-U",
            "skiff",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
            "--locale-provider=icu",
            "--icu-locale=en",
        )

    def start(self) -> None:
        """Starts the server and returns when it answers."""
        command = [
            *(
                str(self._programs / "postgres"),
                "-D",
                str(self._data),
                "-k",
                str(self._folder),
                "-p",
                str(PORT),
            ),
            *("-c", "listen_addresses=", "-c", "shared_buffers=16MB"),
            *("-c", "fsync=off"),  # the tests end the server, never the machine: what it wrote stays
        ]
        with (self._folder / "postgres.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, user=self._user, group=self._group
            )
        self._run("pg_isready", "-q", "-h", str(self._folder), "-p", str(PORT), "-t", "30", retried=True)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Ends the server: SIGINT breaks connections off, SIGQUIT is a crash."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(STOP_TIMEOUT_SECONDS)
            self._process = None

    def database(self) -> str:
        """The URL of a new, empty database, whose locale sorts unlike bytes do."""
        self._made += 1
        name = f"skiff_{self._made}"
        self._run("createdb", "-h", str(self._folder), "-p", str(PORT), "-U", "skiff", name)
        return f"postgresql+psycopg://skiff@/{name}?host={self._folder}&port={PORT}"

    def _run(self, program: str, *arguments: str, retried: bool = False) -> None:
        command = [str(self._programs / program), *arguments]
        deadline = time.monotonic() + (START_TIMEOUT_SECONDS if retried else 0.0)
        while True:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                cwd="/",
                user=self._user,
                group=self._group,
            )
            if done.returncode == 0:
                return
            ended = self._process is not None and self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        log = self._folder / "postgres.log"
        said = log.read_text(errors="replace") if log.exists() else ""
        raise ServiceError(f"{program} ended with code {done.returncode}: {done.stdout}{done.stderr}\n{said}")
