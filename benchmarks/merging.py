"""Windows against whylogs: bytes of 1,000 rows of 30 features on the wire, and the time to merge two such profiles.

    python -m benchmarks.merging [--cache FOLDER]

Both see the same rows, cut into as many windows, in turns of one run. whylogs lives in the environment that
`benchmarks.drift_peers` makes; where it is not, this says so and installs nothing. Ours is a whole message: latency,
health and the counts of the model's answers are in it, too. whylogs keeps sketches of what it saw and ours counts in
cells that were fixed at training: neither can answer all the other can.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks import rig
from benchmarks.environments import CACHE, HERE
from edge_runtime.contract import ids
from edge_runtime.contract.codec import decode, encode
from edge_runtime.contract.latency import observe_ns
from edge_runtime.contract.messages import Health, Window
from edge_runtime.contract.profile import Binner, Profile
from edge_runtime.engine import Engine

ROWS: Final = 1_000
WINDOWS: Final = 40
ROUNDS: Final = 5
RUN_SECONDS: Final = 600
PEER: Final = "whylogs"
START_NS: Final = 1_790_000_000_000_000_000


def _messages(model: Path, windows: NDArray[np.float32]) -> list[bytes]:
    """Each window (rows, F) of ``windows`` as a device would send it."""
    engine = Engine(model)
    info = engine.info
    made = []
    for seq, rows in enumerate(windows, 1):
        labels, scores = engine.run(rows)
        assert labels is not None
        binner = Binner(info.reference.spec, probabilities=info.manifest.probabilities)
        binner.observe(rows, labels, scores)
        rng = np.random.default_rng(seq)
        durations = (20_000 * np.exp(0.3 * rng.normal(size=len(rows)))).astype(np.int64)
        made.append(
            encode(
                Window(
                    device=ids.device_id("gateway-00001"),
                    session=ids.session_id("0123456789abcdef"),
                    seq=seq,
                    seq_lo=seq,
                    model=rig.MODEL,
                    digest=ids.digest_of(model.read_bytes()),
                    start_ns=START_NS,
                    end_ns=START_NS + 300_000_000_000,
                    synced=True,
                    profile=binner.take(),
                    latency=observe_ns(durations),
                    queueing=observe_ns(3 * durations),
                    health=Health(rss_bytes=71_303_168, peak_rss_bytes=74_448_896, cpu_ns=3_600_123_456_789),
                )
            )
        )
    engine.close()
    return made


def _merge(messages: Sequence[bytes]) -> tuple[float, float]:
    """Microseconds a merge of two profiles, and a merge with the reading of one message."""
    profiles = [_profile(message) for message in messages]
    began = time.perf_counter()
    total = profiles[0]
    for profile in profiles[1:]:
        total = total.merge(profile)
    between = time.perf_counter()
    again = _profile(messages[0])
    for message in messages[1:]:
        again = again.merge(_profile(message))
    ended = time.perf_counter()
    assert again == total
    each = 1e6 / (len(messages) - 1)
    return (between - began) * each, (ended - between) * each


def _profile(message: bytes) -> Profile:
    window = decode(message)
    assert isinstance(window, Window)
    return window.profile


def _peer(python: Path, rows: Path) -> dict[str, Any]:
    """What `merging_child` measured; raises RuntimeError where it fails."""
    command = [str(python), str(HERE / "merging_child.py"), str(rows), str(WINDOWS)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=RUN_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{PEER} failed: {(done.stderr.splitlines() or ['no output'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(*, rounds: int = ROUNDS, cache: Path = CACHE) -> list[dict[str, Any]]:
    """A row of figures for skiff and one for whylogs, which has a ``reason`` instead where it cannot run."""
    python = cache / PEER / "bin" / "python"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        features = rig.watch_rows()[0]
        rng = np.random.default_rng(0)
        windows = features[rng.integers(len(features), size=(WINDOWS, ROWS))]
        rows = folder / "rows.npy"
        np.save(rows, windows.reshape(-1, windows.shape[2]))
        messages = _messages(rig.artifact(folder, "logistic"), windows)
        ours: list[tuple[float, float]] = []
        theirs: list[dict[str, Any]] = []
        reason = (
            ""
            if python.is_file()
            else f"not installed: `python -m benchmarks.drift_peers` does it ({python})"
        )
        for _ in range(rounds):
            ours.append(_merge(messages))
            if not reason:
                try:
                    theirs.append(_peer(python, rows))
                except (RuntimeError, subprocess.TimeoutExpired) as e:
                    reason = str(e)
    found: list[dict[str, Any]] = [
        {
            "profile": "skiff",
            "bytes": round(statistics.fmean(map(len, messages))),
            "merge us": rig.spread([merge for merge, _ in ours], 1),
            "read and merge us": rig.spread([both for _, both in ours], 1),
        }
    ]
    if reason:
        return [*found, {"profile": PEER, "bytes": reason, "merge us": "-", "read and merge us": "-"}]
    found.append(
        {
            "profile": PEER,
            "bytes": round(theirs[0]["bytes"]),
            "merge us": rig.spread([one["merge_us"] for one in theirs], 1),
            "read and merge us": rig.spread([one["both_us"] for one in theirs], 1),
        }
    )
    found.append(
        {
            "profile": f"{PEER} / skiff",
            "bytes": round(found[1]["bytes"] / found[0]["bytes"], 1),
            "merge us": str(rig.over([one["merge_us"] for one in theirs], [a for a, _ in ours])),
            "read and merge us": str(rig.over([one["both_us"] for one in theirs], [b for _, b in ours])),
        }
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.merging``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merging", description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the peers are installed")
    for row in run(cache=parser.parse_args(arguments).cache):
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
