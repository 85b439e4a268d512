"""What was measured, beside the budgets of a hardware class from ``device_configs/``."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).resolve().parents[1] / "device_configs"
CLASSES: Final = ("simulator.toml", "x86-gateway.toml")
_FIRST_NUMBER: Final = re.compile(r"-?[0-9.]+")

Figures = Sequence[Mapping[str, Any]]


def worst(figures: Figures, column: str) -> float | None:
    """The largest value of a column; of a spread, ``middle (low-high)``, the middle. None where nobody has it."""
    values = [row[column] for row in figures if column in row]
    return max((float(_FIRST_NUMBER.match(str(value))[0]) for value in values), default=None)  # type: ignore[index]


def run(
    device: Figures, update: Figures, window: Figures, *, classes: Sequence[str] = CLASSES
) -> list[dict[str, Any]]:
    """One row per budget that a class has and that was measured here: within, or over.

    The figures are those of `benchmarks.device`, `benchmarks.update` and `benchmarks.window`; times are of this machine
    and hold for classes that are like it.
    """
    two = [row for row in window if row["classes"] == 2]
    measured = {
        "rss_mb": worst(device, "skiffd rss MB"),
        "load_peak_mb": worst([*device, *update], "skiffd peak MB"),
        "swap_peak_mb": worst(update, "daemon peak MB"),
        "update_mb": worst(update, "update child peak MB"),
        "window_bytes": worst(two, "bytes"),
        "start_seconds": worst(device, "skiffd start s"),
    }
    limits = {"swap_peak_mb": "load_peak_mb"}
    rows = []
    for name in classes:
        budgets = tomllib.loads((FOLDER / name).read_text(encoding="utf-8")).get("budgets", {})
        for figure, value in measured.items():
            limit = budgets.get(limits.get(figure, figure), 0)
            if value is not None and limit:
                verdict = "within" if value <= limit else "OVER"
                rows.append(
                    {"class": name, "figure": figure, "measured": value, "budget": limit, "verdict": verdict}
                )
    return rows
