"""The process in which a check tries the engine: one JSON document on stdin, one JSON object on stdout."""

import json
import sys
from pathlib import Path

from edge_runtime.adapters.probes import Probes
from edge_runtime.contract import ids
from edge_runtime.contract.errors import SkiffError
from edge_runtime.contract.fields import Fields
from edge_runtime.engine import Engine


def main() -> int:
    """Loads the model, if the task names one, and asks it one golden row."""
    f = Fields(json.load(sys.stdin), "task")
    path, digest, threads = f.text("path", max_length=4096), f.text("digest"), f.integer("threads")
    problem = ""
    try:
        if path:
            problem = Engine(Path(path), threads=threads, expect=ids.digest(digest)).golden_problem()
    except SkiffError as e:
        problem = str(e)
    health = Probes().health()
    answer = {"problem": problem, "rss_bytes": health.rss_bytes, "peak_rss_bytes": health.peak_rss_bytes}
    sys.stdout.write(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
