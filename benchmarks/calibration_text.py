"""The calibration report: from the runs to rates with intervals, and from those to tables in Markdown."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from scipy.stats import binomtest

from benchmarks.raw_tests import TESTS, threshold

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "explanation" / "calibration.md"
BEGIN: Final = "<!-- calibration: written by python -m benchmarks.calibration --docs -->"
END: Final = "<!-- calibration: end -->"
FLEET_KINDS: Final = ("drift", "skew")
OUTPUT_KINDS: Final = ("prediction", "performance")
DEVICE_KINDS: Final = ("sensor", "quality")
_CONFIDENCE: Final = 0.95
_FALSE: Final = """\
Nominal: {level:.0%} of the runs of {windows} windows (or as many as it says), all alarms of all kinds together.
In brackets the exact 95 % interval."""
_POWER: Final = """\
The share of {faulty} runs in which the right column was named, in brackets its exact 95 % interval in percent, and the
median number of whole windows that passed since the fault began (0: at once). The raw tests see all rows and alarm in
at most {level:.0%} of {matched} drift-free runs of the scenario. **Bold**: a raw test is better than skiff."""

Run = Mapping[str, Any]
Row = dict[str, Any]


def report(runs: Sequence[Run], *, size: Mapping[str, int], level: float, start: int) -> dict[str, Any]:
    """Everything the tables show; ``level`` is the nominal rate of false alarms per run, faults begin at ``start``."""
    return {
        "size": dict(size),
        "level": level,
        "start": start,
        "false_alarms": _false_alarms(runs),
        "power": _power(runs, level, start),
        "attribution": _attribution(runs, start),
        "seconds": _seconds(runs),
    }


def interval(count: int, runs: int) -> tuple[float, float]:
    """The exact two-sided 95 % interval of a share (C. J. Clopper and E. S. Pearson, 1934)."""
    found = binomtest(count, runs).proportion_ci(_CONFIDENCE, method="exact")
    return float(found.low), float(found.high)


def share(count: int, runs: int) -> Row:
    """A share with its interval."""
    low, high = interval(count, runs)
    return {
        "count": count,
        "runs": runs,
        "share": round(count / runs, 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


def _groups(runs: Iterable[Run], *keys: str) -> dict[tuple[Any, ...], list[Run]]:
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(run[key] for key in keys), []).append(run)
    return found


def _false_alarms(runs: Sequence[Run]) -> list[Row]:
    """One row for each drift-free scenario, its number of windows and its arm."""
    rows = []
    clean = [run for run in runs if not run["fault"]]
    for (kind, scenario, windows), group in _groups(clean, "kind", "scenario", "windows").items():
        name = scenario if kind == "clean" else f"{scenario}, one column of categories"
        for arm in group[0]["arms"]:
            wrong = [run for run in group if run["alarms"][arm]]
            kinds: dict[str, int] = {}
            for run in wrong:
                for found in {alarm["kind"] for alarm in run["alarms"][arm]}:
                    kinds[found] = kinds.get(found, 0) + 1
            rows.append(
                {
                    "scenario": name,
                    "windows": windows,
                    "arm": arm,
                    **share(len(wrong), len(group)),
                    "kinds": kinds,
                    "seeds": [run["seed"] for run in wrong],
                    "examples": [run["alarms"][arm][0]["why"] for run in wrong[:3]],
                }
            )
    return rows


def _power(runs: Sequence[Run], level: float, start: int) -> list[Row]:
    """One row for each scenario, arm and fault: how often the right column was named, and after how many windows."""
    faulty = [run for run in runs if run["kind"] == "faulty"]
    limits: dict[tuple[str, str, str], float] = {}
    for (scenario,), group in _groups((run for run in faulty if not run["fault"]), "scenario").items():
        for arm in group[0]["raw"]:
            for name in TESTS:
                limits[scenario, arm, name] = threshold([run["raw"][arm][name][0] for run in group], level)
    rows = []
    for (scenario, fault), group in _groups((r for r in faulty if r["fault"]), "scenario", "fault").items():
        for arm in group[0]["arms"]:
            row: Row = {"scenario": scenario, "arm": arm, "fault": fault, "runs": len(group)}
            row["skiff"] = _delays([_delay(run, arm, start) for run in group])
            row["others named"] = sum(_others(run, arm, start) for run in group)
            for name in TESTS:
                if group[0]["raw"].get(arm):
                    limit = limits[scenario, arm, name]
                    row[name] = _delays([_passes(run["raw"][arm][name], limit) for run in group])
            row["lost to"] = [name for name in TESTS if name in row and _beats(row[name], row["skiff"])]
            rows.append(row)
    return rows


def _right(run: Run, alarm: Mapping[str, Any]) -> bool:
    """Whether the alarm names what the fault moved: its column, or the outputs where only they move."""
    if run["fault"].startswith("correlation"):
        return alarm["kind"] in OUTPUT_KINDS or alarm["feature"] == "score"
    return alarm["feature"] in run["columns"]


def _delay(run: Run, arm: str, start: int) -> int | None:
    """Windows from the fault to the first alarm that names it; None where none does, or one stood already."""
    right = [alarm for alarm in run["alarms"][arm] if _right(run, alarm)]
    stood = (a for a in right if a["opened"] < start and (a["closed"] is None or a["closed"] >= start))
    if any(stood):
        return None
    opened = [alarm["opened"] - start for alarm in right if alarm["opened"] >= start]
    return min(opened, default=None)


def _others(run: Run, arm: str, start: int) -> bool:
    """Whether a column was named that nothing was wrong with; outputs may move with their inputs."""
    return any(
        alarm["feature"] is not None and alarm["feature"] not in (*run["columns"], "score")
        for alarm in run["alarms"][arm]
        if alarm["opened"] >= start
    )


def _passes(series: Sequence[float], limit: float) -> int | None:
    return next((k for k, value in enumerate(series) if value > limit), None)


def _delays(found: Sequence[int | None]) -> Row:
    delays = [delay for delay in found if delay is not None]
    low, high = interval(len(delays), len(found))
    return {
        "share": round(len(delays) / len(found), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "delay": statistics.median(delays) if delays else None,
    }


def _beats(one: Row, other: Row) -> bool:
    """More often right; or as often, and sooner."""
    if one["share"] != other["share"]:
        return bool(one["share"] > other["share"])
    return one["delay"] is not None and one["delay"] < other["delay"]


def _attribution(runs: Sequence[Run], start: int) -> list[Row]:
    """One row for each scenario, arm and fault: of the runs in which it was named, how often as what it is."""
    rows = []
    attributed = [run for run in runs if run["kind"] == "attributed"]
    for (scenario, fault), group in _groups(attributed, "scenario", "fault").items():
        for arm in group[0]["arms"]:
            found = [_attributed(run, arm, start) for run in group]
            named = [right for right in found if right is not None]
            row = {"scenario": scenario, "arm": arm, "fault": fault, "runs": len(group), "named": len(named)}
            row["broken"] = len(group[0]["hit"]) <= 3
            row["seeds"] = [run["seed"] for run, right in zip(group, found, strict=True) if right is False]
            rows.append({**row, "right": sum(named)})
    return rows


def _attributed(run: Run, arm: str, start: int) -> bool | None:
    """Whether the column's alarms tell a few broken sensors, and which, from a shift of the fleet; None without any."""
    mine = [a for a in run["alarms"][arm] if a["feature"] in run["columns"] and a["opened"] >= start]
    if not mine:
        return None
    fleet = any(alarm["kind"] in FLEET_KINDS for alarm in mine)
    if len(run["hit"]) > 3:
        return fleet and not any(alarm["kind"] == "sensor" for alarm in mine)
    blamed = {device for alarm in mine if alarm["kind"] in DEVICE_KINDS for device in alarm["devices"]}
    return not fleet and blamed == set(run["hit"])


def _seconds(runs: Sequence[Run]) -> Row:
    """Processor seconds of a look, the median over runs of the usual length; one arm judges once a window."""
    looks = [run["seconds"]["judge"] / (run["windows"] * len(run["arms"])) for run in runs]
    return {"judge_ms_per_window": round(1e3 * statistics.median(looks), 1)}


# ── tables ─────────────────────────────────────────────────────────────────────────────────────────────


def markdown(found: Mapping[str, Any]) -> str:
    """The tables, with a sentence on each."""
    size = found["size"]
    text = [
        "### Drift-free runs with any alarm",
        "",
        _FALSE.format(level=found["level"], **size),
        "",
        *_false_table(found["false_alarms"]),
        "",
        "### Faults named, and windows until then",
        "",
        _POWER.format(level=found["level"], **size),
        "",
        *_power_table(found["power"]),
        "",
        "### Broken sensors and shifts of the fleet, told apart",
        "",
        *_attribution_table(found["attribution"]),
        "",
        f"One look costs {found['seconds']['judge_ms_per_window']} ms of processor time, the median over all runs.",
    ]
    return "\n".join(text)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _false_table(rows: Sequence[Row]) -> list[str]:
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(row["kinds"].items()))
        text = f"{row['count']} of {row['runs']} ({row['low']:.1%} to {row['high']:.1%})"
        cells.setdefault((row["scenario"], row["windows"]), {})[row["arm"]] = text + (
            f": {kinds}" if kinds else ""
        )
    body = [
        [scenario, str(windows), *(found.get(arm, "-") for arm in arms)]
        for (scenario, windows), found in cells.items()
    ]
    return _table(["scenario", "windows", *arms], body)


def _power_table(rows: Sequence[Row]) -> list[str]:
    body = []
    for row in rows:
        cells = [row["scenario"], row["arm"], row["fault"], _cell(row["skiff"], lost=bool(row["lost to"]))]
        cells += [_cell(row[name], lost=False) if name in row else "-" for name in TESTS]
        body.append([*cells, str(row["others named"])])
    return _table(["scenario", "against", "fault", "skiff", *TESTS, "runs with others named, too"], body)


def _cell(found: Row, *, lost: bool) -> str:
    text = f"{found['share']:.0%} [{100 * found['low']:.0f}-{100 * found['high']:.0f}]"
    text += "" if found["delay"] is None else f", {found['delay']:g}"
    return f"**{text} (lost)**" if lost else text


def _attribution_table(rows: Sequence[Row]) -> list[str]:
    body = [
        [
            row["scenario"],
            row["arm"],
            row["fault"],
            f"{row['named']} of {row['runs']}",
            f"{row['right']} of {row['named']}",
        ]
        for row in rows
    ]
    for broken, name in ((True, "broken sensors, all"), (False, "shifts, all")):
        mine = [row for row in rows if row["broken"] is broken]
        right, named, runs = (sum(row[key] for row in mine) for key in ("right", "named", "runs"))
        if named:
            low, high = interval(right, named)
            text = f"{right} of {named} ({low:.1%} to {high:.1%})"
            body.append(["", "", name, f"{named} of {runs}", text])
    return _table(["scenario", "against", "what", "named", "rightly told"], body)


def write(found: Mapping[str, Any], page: Path = PAGE) -> None:
    """Puts the tables between the marks of the page; raises ValueError where a mark is missing."""
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: no block between {BEGIN!r} and {END!r}")
    page.write_text(f"{head}{BEGIN}\n\n{markdown(found)}\n\n{END}{tail}", encoding="utf-8")
