"""The cases as a table: what was to be expected, what was said, and what the model's accuracy was."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.real_data.cases import Case

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "real-data.md"
BEGIN: Final = "<!-- real data: written by python -m benchmarks.real_data --docs -->"
END: Final = "<!-- real data: end -->"

_SAID: Final = {
    "nothing": "no change",
    "harmless": "harmless",
    "harmful": "harmful",
    "fault": "fault",
}


def row(case: Case, found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one case from the document of ``skiff backtest``."""
    changed = len(found["windows"]) if case.changed is None else case.changed
    before, after = found["windows"][:changed], found["windows"][changed:]
    alarms = found["alarms"]
    early = [alarm for alarm in alarms if alarm["opened_window"] < changed]
    asked = [wish["window"] for wish in found["retrain_requests"]]
    return {
        "case": case.name,
        "what": case.what,
        "kind": case.kind,
        "windows": len(found["windows"]),
        "devices": max(window["devices"] for window in found["windows"]),
        "changed": case.changed,
        "accuracy before": _mean(before, "accuracy"),
        "accuracy after": _mean(after, "accuracy"),
        "estimate before": _mean(before, "estimated_accuracy"),
        "estimate after": _mean(after, "estimated_accuracy"),
        "early alarms": len(early),
        "alarms": dict(sorted(Counter(f"{a['severity']} {a['kind']}" for a in alarms).items())),
        "first alarm": min((alarm["opened_window"] for alarm in alarms), default=None),
        "request": min(asked, default=None),
        "refused": sum(sum(window["refused"].values()) for window in found["windows"]),
        "right": right(case, found),
    }


def right(case: Case, found: Mapping[str, Any]) -> bool:
    """Whether it was what the rows deserve.

    Before the change, and without one: silence. Harmless: no request for a better model. Harmful: a request. A fault:
    told of, by an alarm or by refused rows, and no request.
    """
    requests, alarms, windows = found["retrain_requests"], found["alarms"], found["windows"]
    changed = len(windows) if case.changed is None else case.changed
    if any(alarm["opened_window"] < changed for alarm in alarms):
        return False
    if case.kind == "nothing":
        return not alarms and not requests
    if case.kind == "harmless":
        return not requests
    if case.kind == "harmful":
        return bool(requests) and all(wish["window"] >= changed for wish in requests)
    return not requests and (bool(alarms) or any(window["refused"] for window in windows))


def _mean(windows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """By rows."""
    found = [(window[name], window["rows"]) for window in windows if window[name] is not None]
    return statistics.fmean([v for v, _ in found], weights=[n for _, n in found]) if found else None


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table."""
    heads = ("", "what", "rows hold", "windows, devices", "accuracy", "alarms", "request", "right")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(_cells(one))} |" for one in rows]
    return "\n".join(lines)


def _cells(one: Mapping[str, Any]) -> tuple[str, ...]:
    before, after = (
        one[f"accuracy {when}"] if one[f"accuracy {when}"] is not None else one[f"estimate {when}"]
        for when in ("before", "after")
    )
    kind = "estimated " if one["accuracy before"] is None and one["accuracy after"] is None else ""
    values = [f"{value:.3f}" for value in (before, after) if value is not None]
    since = f", from window {one['changed']}" if one["changed"] else ""
    told = [f"{n} × {what}" if n > 1 else what for what, n in one["alarms"].items()]
    told += [f"{one['refused']} rows refused"] if one["refused"] else []
    when = f"; first in window {one['first alarm']}" if one["first alarm"] is not None else ""
    return (
        f"`{one['case']}`",
        one["what"],
        _SAID[one["kind"]] + since,
        f"{one['windows']}, {one['devices']}",
        kind + " → ".join(values) if values else "–",
        (", ".join(told) + when) if told else "none",
        "none" if one["request"] is None else f"window {one['request']}",
        "yes" if one["right"] else "**no**",
    )


def write(rows: Iterable[Mapping[str, Any]], page: Path = PAGE) -> None:
    """Puts the table between the marks of the ``page``; raises `ValueError` when they are not there."""
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: the marks {BEGIN!r} and {END!r} are not there")
    page.write_text(f"{head}{BEGIN}\n\n{markdown(rows)}\n\n{END}{tail}", encoding="utf-8")
