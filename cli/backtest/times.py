"""When a row was: timestamps, dates, ISO 8601 text, or numbers since 1970, all as nanoseconds of UTC."""

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cli.backtest.arrow import missing, numbers
from edge_runtime.contract.errors import InputError

UNITS: Final = (
    (1e11, "seconds", 1_000_000_000),
    (1e14, "milliseconds", 1_000_000),
    (1e17, "microseconds", 1000),
    (float(1 << 63), "nanoseconds", 1),
)
"""Numbers whose largest is below the first figure are of the unit: seconds until the year 5138, and so on."""

_LAST_DAY: Final = (1 << 63) // (86400 * 10**9)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_DATE_DIGITS: Final = len("20260301")


def times_ns(array: Any, where: str) -> tuple[NDArray[np.int64], str]:
    """The times (n,) of an Arrow array, and a note on how they were read where that could be doubted.

    Raises `InputError` naming the row of a time that is missing, before 1970, after 2262, or cannot be read.
    """
    import pyarrow as pa

    if array.null_count:
        row = int(missing(array).argmax()) + 1
        raise InputError("type", f"{where}, row {row}: no time; every row must say when it was")
    array = _without_quotes(array)
    kinds, kind = pa.types, array.type
    note = ""
    if kinds.is_timestamp(kind) or kinds.is_date(kind):
        found = _of_timestamps(array, where)
        note = f"{where} names no time zone: taken as UTC" if kinds.is_timestamp(kind) and not kind.tz else ""
    elif kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_decimal(kind):
        found, note = _of_numbers(array, where)
    elif kinds.is_string(kind) or kinds.is_large_string(kind):
        found, zoneless = _of_texts(array, where)
        note = f"{where} names no time zone: taken as UTC" if zoneless else ""
    else:
        raise InputError("type", f"{where}: holds {kind}, which is no time")
    if (found < 0).any():
        row = int((found < 0).argmax()) + 1
        raise InputError("type", f"{where}, row {row}: {array[row - 1]} is before 1970")
    return found, note


def _of_timestamps(array: Any, where: str) -> NDArray[np.int64]:
    import pyarrow as pa

    zone = array.type.tz if pa.types.is_timestamp(array.type) else None
    try:
        return numbers(array.cast(pa.timestamp("ns", zone)).view(pa.int64()))
    except pa.ArrowInvalid as e:
        days = numbers(array.cast(pa.date32()).cast(pa.int32()))
        row = int(((days < 0) | (days > _LAST_DAY)).argmax()) + 1
        raise InputError("type", f"{where}, row {row}: is beyond the years 1970 to 2261") from e


def _without_quotes(array: Any) -> Any:
    """Numbers that are written as text as numbers, anything else as it is; eight digits are a date."""
    import pyarrow as pa

    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        return array
    if not len(array) or len(array[0].as_py()) == _DATE_DIGITS:
        return array
    for kind in (pa.int64(), pa.float64()):
        with suppress(pa.ArrowInvalid):
            return array.cast(kind)
    return array


def _of_numbers(array: Any, where: str) -> tuple[NDArray[np.int64], str]:
    """Times of numbers since 1970, and a note on their unit."""
    import pyarrow as pa

    exact = pa.types.is_integer(array.type)
    found = numbers(array if exact else array.cast(pa.float64(), safe=False))
    wide = found.astype(np.float64)
    if not np.isfinite(wide).all():
        row = int((~np.isfinite(wide)).argmax()) + 1
        raise InputError("type", f"{where}, row {row}: no time; every row must say when it was")
    sizes = np.abs(wide)
    largest = int(sizes.argmax())
    which = int(np.searchsorted([below for below, _, _ in UNITS], sizes[largest], side="right"))
    if which == len(UNITS) or sizes[largest] * UNITS[which][2] >= 1 << 63:
        raise InputError(
            "type", f"{where}, row {largest + 1}: {array[largest]} is beyond the years 1970 to 2261"
        )
    _, unit, factor = UNITS[which]
    note = f"{where} holds numbers: taken as {unit} since 1970"
    if which:
        note += _doubted(array, where, sizes, which)
    if exact:
        return np.asarray(found.astype(np.int64) * factor), note
    whole = np.floor(wide)  # apart, so that a second's fraction keeps its digits
    return np.asarray(
        whole.astype(np.int64) * factor + np.rint((wide - whole) * factor).astype(np.int64)
    ), note


def _doubted(array: Any, where: str, sizes: NDArray[np.float64], which: int) -> str:
    """What to add to the note where some numbers are so small that they look like another unit; refuses many."""
    low, coarser, _ = UNITS[which - 1]
    small = sizes < low
    few = int(small.sum())
    if not few:
        return ""
    unit, largest, first = UNITS[which][1], int(sizes.argmax()), int(small.argmax())
    if 2 * few > len(sizes):
        raise InputError(
            "type",
            f"{where}, row {largest + 1}: {array[largest]} is a time in {unit}, but {few} of {len(sizes)} rows look "
            f"like {coarser} (row {first + 1}: {array[first]}); write all in one unit",
        )
    return (
        f", though {few} of {len(sizes)} rows (the first is row {first + 1}: {array[first]}) look like {coarser}: "
        f"such fall to {_EPOCH.year} or soon after"
    )


def _of_texts(array: Any, where: str) -> tuple[NDArray[np.int64], bool]:
    """Times of ISO 8601 text, and whether any of them names no zone."""
    import pyarrow as pa

    for zone in (None, "UTC"):
        try:
            cast = array.cast(pa.timestamp("ns", zone))
        except pa.ArrowInvalid:
            continue
        return numbers(cast.view(pa.int64())), zone is None
    found = np.empty(len(array), np.int64)
    zoneless = False
    for i, text in enumerate(array.to_pylist()):
        try:
            moment = datetime.fromisoformat(text.strip())
        except ValueError as e:
            raise InputError(
                "type", f"{where}, row {i + 1}: {text!r:.40} is no time; ISO 8601 is, as 2026-03-01T12:00:00Z"
            ) from e
        zoneless |= moment.tzinfo is None
        past = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
        found[i] = ((past.days * 86400 + past.seconds) * 1_000_000 + past.microseconds) * 1000
    return found, zoneless
