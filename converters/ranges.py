"""The ranges that a model's maker declares for its features, checked against the training rows."""

import math
from collections.abc import Mapping
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from converters.table import InputDtype, Table
from edge_runtime.contract.errors import ConfigError, InputError
from edge_runtime.contract.fields import nearest
from edge_runtime.contract.manifest import Manifest
from edge_runtime.contract.ranges import Limits

Ranges = Mapping[str, tuple[float | None, float | None]] | Literal["training"]
"""Per feature the smallest and the largest value, None for no limit; or the training rows' own, see `MARGIN`."""

MARGIN: Final = 1.0
"""``training`` widens each column's range by this share of it on either side."""


def read(wanted: Ranges | None, table: Table) -> Limits | None:
    """The limits ``wanted``, in float64; None where there are none.

    Raises:
        ConfigError: a range is none, or is asked for a column that is not there or holds categories.
        InputError: training rows lie outside.
    """
    if wanted is None:
        return None
    if isinstance(wanted, str):
        if wanted != "training":
            raise ConfigError(f"ranges is {wanted!r}; pass 'training', or a mapping of names to (low, high)")
        limits = _of_training(table)
    else:
        limits = _declared(wanted, table)
        _check_training(limits, table)
    return limits if limits.ranged.any() else None


def rounded(limits: Limits, dtype: InputDtype) -> Limits:
    """The limits as values of ``dtype``, rounded to the nearest, as rows are.

    So a row that lies inside before it is rounded lies inside afterwards: 0.1 is 0.100000001 in float32, and stays in a
    range that ends at 0.1. What is too large for ``dtype`` becomes its largest number.
    """
    largest = float(np.finfo(dtype).max)

    def narrow(values: NDArray[np.floating]) -> NDArray[np.floating]:
        kept = np.where(np.isinf(values), values, np.clip(values, -largest, largest))
        return np.asarray(kept.astype(dtype))

    return Limits(narrow(limits.low), narrow(limits.high))


def note(manifest: Manifest) -> tuple[str, ...]:
    """What a certificate says of ranges; nothing where there are none."""
    ranged = sum(feature.ranged for feature in manifest.features)
    if not ranged:
        return ()
    which = (
        "every feature"
        if ranged == len(manifest.features)
        else f"{ranged} of {len(manifest.features)} features"
    )
    return (f"proven inside the ranges that the manifest declares for {which}; devices refuse other rows",)


def _of_training(table: Table) -> Limits:
    low, high = np.full(len(table.columns), -np.inf), np.full(len(table.columns), np.inf)
    for j in np.flatnonzero(~table.coded):
        values = table.wide[np.isfinite(table.wide[:, j]), j]
        if values.size:
            least, most = float(values.min()), float(values.max())
            margin = MARGIN * (
                most - least or max(1.0, abs(least))
            )  # infinite where the range is as wide as float64
            low[j], high[j] = least - margin, most + margin
    return Limits(low, high)


def _declared(wanted: Mapping[str, tuple[float | None, float | None]], table: Table) -> Limits:
    low, high = np.full(len(table.columns), -np.inf), np.full(len(table.columns), np.inf)
    for name, given in wanted.items():
        if name not in table.names:
            hint = nearest(str(name), table.names)
            raise ConfigError(f"ranges: the pipeline has no feature {name!r}{hint}")
        j = table.names.index(name)
        if table.columns[j].vocabulary is not None:
            raise ConfigError(f"ranges: feature {name!r} holds categories, which have no range")
        low[j], high[j] = _pair(name, given)
        if low[j] > high[j]:
            raise ConfigError(f"ranges: feature {name!r} has low {low[j]} above high {high[j]}; swap them")
    return Limits(low, high)


def _pair(name: str, given: object) -> tuple[float, float]:
    pair = list(given) if isinstance(given, tuple | list) else []
    if len(pair) != 2:
        raise ConfigError(f"ranges: feature {name!r} has {given!r}; (low, high) is needed, None for no limit")
    ends = (-math.inf, math.inf)
    low, high = (
        end if value is None else _number(name, value) for end, value in zip(ends, pair, strict=True)
    )
    return low, high


def _number(name: str, value: object) -> float:
    known = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not known or not math.isfinite(value):  # type: ignore[arg-type] # a number, says the line above
        raise ConfigError(
            f"ranges: feature {name!r} has the limit {value!r}; a finite number is needed, or None"
        )
    return float(value)  # type: ignore[arg-type] # likewise


def _check_training(limits: Limits, table: Table) -> None:
    outside = limits.outside(table.wide)
    rows = np.flatnonzero(outside.any(axis=1))
    if not rows.size:
        return
    i = int(rows[0])
    j = int(outside[i].argmax())
    lie = "row lies" if rows.size == 1 else "rows lie"
    raise InputError(
        "range",
        f"X: {rows.size} of {len(table.wide)} training {lie} outside the declared ranges; the first is row {i}, whose "
        f"{table.names[j]!r} is {table.wide[i, j]}, outside {limits.text(j)}: widen the range, or leave such rows out",
    )
