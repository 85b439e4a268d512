"""Running a module in a process of its own, whose answer cannot be larger or later than asked for."""

import json
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

MAX_ANSWER_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: its code (negative: a signal), what it wrote on stdout, and its last words on stderr."""

    code: int
    answer: bytes
    words: str

    @property
    def how(self) -> str:
        """The end in words."""
        if self.code == -signal.SIGXCPU:
            return "used more CPU time than allowed"
        if self.code == -signal.SIGKILL:
            return "was killed from outside, as the kernel does when memory runs out"
        if self.code < 0:
            return f"crashed with {signal.Signals(-self.code).name}"
        return f"ended with code {self.code}"


def limit(kind: int, soft: int, *, beyond: int = 0) -> None:
    """Binds this process for good to ``soft`` of what `resource.setrlimit` calls ``kind``, or less if it is already.

    The hard limit is ``beyond`` more, for a kind whose soft limit sends a signal.
    """
    _, ceiling = resource.getrlimit(kind)
    hard = soft + beyond if ceiling == resource.RLIM_INFINITY else min(soft + beyond, ceiling)
    resource.setrlimit(kind, (min(soft, hard), hard))


def run(module: str, task: Mapping[str, Any], *, timeout_seconds: float) -> Ended:
    """Runs ``python -m module`` with ``task`` as JSON on stdin; raises `TimeoutError` after killing it.

    It writes into files, not pipes: with ``RLIMIT_FSIZE`` it can bound itself whatever it is made to do.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=out, stderr=err
        )
        try:
            child.communicate(json.dumps(task).encode(), timeout=max(0.0, timeout_seconds))
        except subprocess.TimeoutExpired as e:
            raise TimeoutError(f"{module} was not done after {timeout_seconds:.0f} s") from e
        finally:
            child.kill()
            child.wait()
        out.seek(0)
        err.seek(0)
        words = err.read(MAX_ANSWER_BYTES).decode("utf-8", "replace").strip()
        return Ended(child.returncode, out.read(MAX_ANSWER_BYTES), words[-300:])
