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
NOMINAL_BOUND: Final = 0.06
_FALSE: Final = """\
How many runs had any alarm, of any kind, in any window; nominal are {level:.0%} of the runs. In brackets the exact
two-sided 95 % interval. **Bold**: its upper end is above {bound:.0%}."""
_POWER: Final = """\
The share of runs in which the right column was named, in brackets its exact 95 % interval in percent, and the median
number of whole windows that passed since the fault began (0: at once). The raw tests see all rows and alarm in at most
{level:.0%} of the drift-free runs of the scenario ({matched}). **Bold**: a raw test was more often right, or as often
and sooner."""
_ATTRIBUTION: Final = """\
One to three sensors broke, or the fleet shifted; of the runs in which the column was named, how often it was told which
of the two: exactly the broken devices blamed and no fleet verdict, or a fleet verdict and no sensor blamed. In brackets
the exact 95 % interval."""

Run = Mapping[str, Any]
Row = dict[str, Any]


def report(runs: Sequence[Run], *, level: float, start: int) -> dict[str, Any]:
    """Everything the tables show; ``level`` is the nominal rate of false alarms per run, faults begin at ``start``."""
    return {
        "level": level,
        "start": start,
        "false_alarms": _false_alarms(runs),
        "matched": {name: len(group) for (name,), group in _groups(_matched(runs), "scenario").items()},
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
    """One row for each drift-free scenario, its number of windows and its arm; the long runs last."""
    clean = sorted((run for run in runs if run["kind"] == "clean"), key=lambda run: int(run["windows"]))
    return [
        {"scenario": scenario, "windows": windows, "arm": arm, **_alarmed(group, arm)}
        for (scenario, windows), group in _groups(clean, "scenario", "windows").items()
        for arm in group[0]["arms"]
    ]


def _alarmed(group: Sequence[Run], arm: str) -> Row:
    wrong = [run for run in group if run["alarms"][arm]]
    kinds: dict[str, int] = {}
    for run in wrong:
        for found in sorted({alarm["kind"] for alarm in run["alarms"][arm]}):
            kinds[found] = kinds.get(found, 0) + 1
    return {
        **share(len(wrong), len(group)),
        "kinds": kinds,
        "seeds": [run["seed"] for run in wrong],
        "examples": [run["alarms"][arm][0]["why"] for run in wrong[:3]],
    }


def _matched(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run["kind"] == "clean" and run["raw"]]


def _power(runs: Sequence[Run], level: float, start: int) -> list[Row]:
    """One row for each scenario, arm and fault: how often the right column was named, and after how many windows."""
    limits = {
        (scenario, arm, name): threshold([run["raw"][arm][name][0] for run in group], level)
        for (scenario,), group in _groups(_matched(runs), "scenario").items()
        for arm in group[0]["raw"]
        for name in TESTS
    }
    faulty = [run for run in runs if run["kind"] == "faulty"]
    rows = []
    for (scenario, fault), group in _groups(faulty, "scenario", "fault").items():
        for arm in group[0]["arms"]:
            row: Row = {"scenario": scenario, "arm": arm, "fault": fault, "runs": len(group)}
            row["skiff"] = _delays([_delay(run, arm, start) for run in group])
            row["others named"] = sum(_others(run, arm, start) for run in group)
            for name in TESTS:
                if group[0]["raw"].get(arm) and (scenario, arm, name) in limits:
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
    """Processor seconds of a look, the median over runs; one arm judges once a window."""
    looks = [run["seconds"]["judge"] / (run["windows"] * len(run["arms"])) for run in runs]
    return {"judge_ms_per_window": round(1e3 * statistics.median(looks), 1) if looks else None}


# ── tables ─────────────────────────────────────────────────────────────────────────────────────────────


def markdown(found: Mapping[str, Any]) -> str:
    """The tables, with a sentence on each; a part without runs is left out."""
    level = found["level"]
    text = []
    if found["false_alarms"]:
        said = _FALSE.format(level=level, bound=NOMINAL_BOUND)
        text += ["### Drift-free runs with any alarm", "", said, "", *_false_table(found["false_alarms"]), ""]
    if found["power"]:
        matched = ", ".join(f"{name}: {count}" for name, count in found["matched"].items())
        said = _POWER.format(level=level, matched=matched or "none were run")
        text += ["### Faults named, and windows until then", "", said, "", *_power_tables(found["power"])]
    if found["attribution"]:
        table = _attribution_table(found["attribution"])
        text += ["### Broken sensors and shifts of the fleet, told apart", "", _ATTRIBUTION, "", *table, ""]
    cost = found["seconds"]["judge_ms_per_window"]
    text.append(
        "No run was made."
        if cost is None
        else f"One look cost {cost} ms of processor time, in the median run."
    )
    return "\n".join(text)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _false_table(rows: Sequence[Row]) -> list[str]:
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        text = _share(row["count"], row["runs"])
        if row["high"] > NOMINAL_BOUND:
            text = f"**{text}**"
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(row["kinds"].items()))
        cells.setdefault((row["scenario"], row["windows"]), {})[row["arm"]] = text + (
            f": {kinds}" if kinds else ""
        )
    body = [
        [scenario, str(windows), *(found.get(arm, "-") for arm in arms)]
        for (scenario, windows), found in cells.items()
    ]
    usual = min(row["windows"] for row in rows)
    sums = []
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm and row["windows"] == usual]
        sums.append(
            _share(sum(row["count"] for row in mine), sum(row["runs"] for row in mine)) if mine else "-"
        )
    return _table(["scenario", "windows", *arms], [*body, ["all", str(usual), *sums]])


def _share(count: int, runs: int) -> str:
    low, high = interval(count, runs)
    return f"{count} of {runs} ({low:.1%} to {high:.1%})"


def _power_tables(rows: Sequence[Row]) -> list[str]:
    """One for each scenario and past."""
    text = []
    for (scenario, arm), group in _groups(rows, "scenario", "arm").items():
        lost = sum(bool(row["lost to"]) for row in group)
        body = [
            [
                row["fault"],
                str(row["runs"]),
                _cell(row["skiff"], lost=bool(row["lost to"])),
                *(_cell(row[name], lost=False) if name in row else "-" for name in TESTS),
                str(row["others named"]),
            ]
            for row in group
        ]
        text += [f"Scenario `{scenario}`, arm `{arm}`; {lost} of {len(group)} lost:", ""]
        text += [*_table(["fault", "runs", "skiff", *TESTS, "others named, too"], body), ""]
    return text


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
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for broken, name in ((True, "broken sensors, all"), (False, "shifts, all"), (None, "**all**")):
            mine = [row for row in rows if row["arm"] == arm and broken in {None, row["broken"]}]
            right, named, runs = (sum(row[key] for row in mine) for key in ("right", "named", "runs"))
            if named:
                body.append(["all", arm, name, f"{named} of {runs}", _share(right, named)])
    return _table(["scenario", "arm", "what", "named", "rightly told"], body)


def write(found: Mapping[str, Any], page: Path = PAGE) -> None:
    """Puts the tables between the marks of the page; raises ValueError where a mark is missing."""
    fill(page, BEGIN, END, markdown(found))


def fill(page: Path, begin: str, end: str, text: str) -> None:
    """Puts ``text`` between two marks of a page; raises ValueError where a mark is missing."""
    head, first, rest = page.read_text(encoding="utf-8").partition(begin)
    _, last, tail = rest.partition(end)
    if not first or not last:
        raise ValueError(f"{page}: no block between {begin!r} and {end!r}")
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}", encoding="utf-8")
