"""What commands share about text: how a list is shown, and which cells of a text file hold nothing."""

from collections.abc import Collection
from typing import Final

MISSING: Final = frozenset(
    {"", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "-nan", "-NaN", "NULL", "null", "None"}
)
"""Cells of a CSV file that hold no value, unless a category has the text as its name."""

_SHOWN: Final = 12


def listed(values: Collection[object]) -> str:
    """The first of the values, quoted as Python quotes them, and how many more there are."""
    shown = [repr(str(value)) if isinstance(value, str) else repr(value) for value in list(values)[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")
