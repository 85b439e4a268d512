"""``skiffd`` beside a script that does the least: memory, and the time from the start to the first answered row.

The time is told twice: as a clock shows it, and as CPU time, which a busy machine hardly changes.

Both load the same artifact in a process of their own, answer the same row from stdin, connect to the same Mosquitto,
with TLS and client certificates in both or in neither, and are read once their memory stands still. ``skiffd`` has
by then also closed a window, kept it on disk and sent it. They take turns, and ratios are taken start by start.
`benchmarks.minimal_device` is the script.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import rig
from benchmarks.rig import Address, Memory, Running

STARTS: Final = 7
WINDOW_SECONDS: Final = 1.0
TARGETS: Final = {"rss": 1.10, "start": 1.5}
"""Most that ``skiffd`` may need, in terms of the script."""

_Start = tuple[float, float, Memory]


def measure(model: Path, at: Address, row: Sequence[float], folder: Path, *, starts: int) -> dict[str, Any]:
    """The figures of both, over ``starts`` starts each; one more each before leaves byte code and warm caches."""
    script = ("benchmarks.minimal_device", str(model), at.host, str(at.port), *at.tls)
    found: dict[str, list[_Start]] = {"skiffd": [], "script": []}
    for turn in range(starts + 1):
        home = folder / f"start-{turn}"
        config = rig.provision(home, model, at, source="stdio", window_seconds=WINDOW_SECONDS)
        skiffd = ("edge_runtime.skiffd", str(config))
        for name, command, events in (
            ("skiffd", skiffd, ("connected", "window_closed")),
            ("script", script, ("connected",)),
        ):
            with Running(*command, row=row, events=events) as running:
                one = (running.answer_seconds, running.answer_cpu_seconds, running.settled())
            if turn:
                found[name].append(one)
    return _figures(found)


def _figures(found: dict[str, list[_Start]]) -> dict[str, Any]:
    seconds = {name: [s for s, _, _ in each] for name, each in found.items()}
    cpu = {name: [c for _, c, _ in each] for name, each in found.items()}
    rss = {name: [m.rss_mb for _, _, m in each] for name, each in found.items()}
    pss = {name: [m.pss_mb for _, _, m in each] for name, each in found.items()}
    peak = {name: [m.peak_mb for _, _, m in each] for name, each in found.items()}
    return {
        "starts": len(found["skiffd"]),
        **{f"{name} rss MB": rig.spread(rss[name]) for name in found},
        "rss ratio": rig.over(rss["skiffd"], rss["script"]),
        **{f"{name} pss MB": rig.spread(pss[name]) for name in found},
        **{f"{name} peak MB": rig.spread(peak[name]) for name in found},
        **{f"{name} start s": rig.spread(seconds[name], 3) for name in found},
        "start ratio": rig.over(seconds["skiffd"], seconds["script"]),
        **{f"{name} start cpu s": rig.spread(cpu[name], 3) for name in found},
        "start cpu ratio": rig.over(cpu["skiffd"], cpu["script"]),
    }


def run(
    *,
    estimators: Sequence[str] = tuple(rig.ESTIMATORS),
    tls: Sequence[bool] = (False, True),
    starts: int = STARTS,
) -> list[dict[str, Any]]:
    """One row of figures per model, with TLS off and on; raises `NoBroker` without Mosquitto."""
    rows = []
    row = rig.watch_rows()[0][0].tolist()
    with rig.workplace() as folder:
        for estimator in estimators:
            model = rig.artifact(folder, estimator)
            for spoken in tls:
                home = folder / f"{model.stem}-{'tls' if spoken else 'plain'}"
                with rig.mosquitto(home / "broker", tls=spoken) as at:
                    figures = measure(model, at, row, home, starts=starts)
                rows.append({"model": estimator, "tls": "on" if spoken else "off"} | figures)
    return rows


def main() -> int:
    """Prints the table, and each ratio beside what it may be."""
    for figures in run():
        print(f"{figures['model']}, TLS {figures['tls']}, {figures['starts']} starts each")
        for name, value in list(figures.items())[3:]:
            target = TARGETS.get(name.removesuffix(" ratio"))
            print(f"  {name:16} {value}" + (f"   at most {target}" if target else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
