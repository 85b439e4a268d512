"""Many small counters as few bytes, and back, without a loop over counters. The first byte names the scheme.

Schemes 1 to 8, **byte planes**: so many bytes a counter, all lowest bytes first, then all second bytes, …, as raw
deflate ("shuffle" of HDF5 and Blosc: the high planes are nearly all zero).

Scheme 9, **columns in step**: a profile is a table, one column of cells after another. Cells at the same place in
their columns hold like numbers, because cells are cut at quantiles, so they are coded together, as differences from a
common base, by Rice codes (R. F. Rice, JPL 79-22, 1979). After the scheme's byte:

1. five numbers as LEB128: how many counters there are, the ``period`` (counters a column has), how many ``columns`` are
   coded so (the other counters are the ``tail``), the place ``implied``, and the ``total``.
2. ``period + 2`` widths of four bits, the high half of a byte first: of the bases, of the ``period`` places, of the
   tail.
3. bits, the highest of a byte first, for these numbers in order: ``period`` bases, each as its difference from the base
   before (from 0 at first); place by place, the counter of each column as its difference from the place's base; the
   tail, each counter as its difference from the one before (from 0 at first). A difference ``d`` is folded to ``2d``
   when it is at least 0, to ``-2d - 1`` otherwise. A number of width 0 is 0 and has no bits. One of width ``w`` is cut
   into its ``w - 1`` low bits and the rest: first come the rests of all numbers, each as so many 0 bits and a 1, then
   the low bits of all, the highest first. The last byte is filled with 0.

Where ``implied`` is not 0, every column's counters but the last (``repeat``) add up to ``total``, and the one at place
``implied - 1``, sent as its base, is what the others leave of it.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.profile import MAX_CLASSES, MAX_EDGES, MAX_FEATURES, Counts

MAX_COUNTERS: Final = MAX_FEATURES * (MAX_EDGES + 4) + MAX_CLASSES
IN_STEP: Final = 9
MAX_PERIOD: Final = MAX_EDGES + 4
_MAX_WIDTH: Final = 15
_MAX_SAMPLE: Final = 4 * MAX_PERIOD
"""Counters looked at to find the period."""
_PLANES_TOGETHER: Final = 32
"""Payloads of byte planes that are put together at once."""
_TOGETHER: Final = 8
_MAX_TOGETHER: Final = 1 << 15
"""So many payloads, and so many numbers of them, are unpacked at once: what they need stays in the cache."""
_MAX_TOGETHER_BYTES: Final = 1 << 12
"""A payload longer than this is unpacked alone: thirty such would take a hundred times their length."""
_LARGEST: Final = 1 << 32
"""Counters from here on are left to byte planes; below it nothing in scheme 9 comes near 64 bits."""


M = TypeVar("M")

_PENDING: Final = ContractError("counts: not unpacked yet")


def pack_counts(counts: Counts) -> bytes:
    """``(n,)`` counts of at least 0 in the shortest of the schemes."""
    planes = pack_planes(counts)
    in_step = _pack_in_step(counts) if 4 <= counts.size <= MAX_COUNTERS else None
    return in_step if in_step is not None and len(in_step) < len(planes) else planes


def unpack_counts(data: bytes, *, max_counters: int = MAX_COUNTERS) -> Counts:
    """Reverses `pack_counts`; raises `ContractError` on anything else, never unpacking more than ``max_counters``."""
    (found,) = unpack_all((data,), max_counters=max_counters)
    if isinstance(found, ContractError):
        raise found
    return found


def unpack_all(packed: Sequence[bytes], *, max_counters: int = MAX_COUNTERS) -> list[Counts | ContractError]:
    """`unpack_counts` of many at once: each one's counters, or what it would raise.

    Those of one shape, which is those of one layout, share every numpy call: two fifths of the time.
    """
    found: list[Counts | ContractError] = [_PENDING] * len(packed)
    alike: dict[tuple[int, int, int], list[tuple[int, _Head]]] = {}
    flat: dict[tuple[int, int], list[tuple[int, bytes]]] = {}
    for i, data in enumerate(packed):
        try:
            scheme = _scheme(data)
            if scheme == IN_STEP:
                head = _read_head(data, max_counters)
                if len(head.bits) > _MAX_TOGETHER_BYTES:  # none of a layout that exists
                    found[i] = _unpack_alone(head)
                else:
                    alike.setdefault((head.period, head.columns, head.tail), []).append((i, head))
                continue
            raw = _inflate(data, max_counters)
            if len(raw) > _MAX_TOGETHER:  # to keep many such until all are read takes memory
                (found[i],) = _join_planes(scheme, [raw])
            else:
                flat.setdefault((scheme, len(raw)), []).append((i, raw))
        except ContractError as e:
            found[i] = e
    for (planes, length), raws in flat.items():
        _fill(
            found, raws, min(_PLANES_TOGETHER, _MAX_TOGETHER // (1 + length)), partial(_join_planes, planes)
        )
    for (period, columns, tail), heads in alike.items():
        size = min(_TOGETHER, _MAX_TOGETHER // (1 + period * (1 + columns) + tail))
        _fill(found, heads, size, _unpack_heads)
    return found


def _scheme(data: bytes) -> int:
    """The first byte; raises `ContractError` when it names no scheme."""
    if not data or not 1 <= data[0] <= IN_STEP:
        raise ContractError(
            f"counts: the scheme must be 1 to {IN_STEP}; update this side if the sender is newer"
        )
    return data[0]


def _fill(
    found: list[Counts | ContractError],
    members: Sequence[tuple[int, M]],
    size: int,
    unpack: Callable[[Sequence[M]], Sequence[Counts | ContractError]],
) -> None:
    """Unpacks ``size`` of the members at once, one at least, each to its place in ``found``."""
    for start in range(0, len(members), max(1, size)):
        part = members[start : start + max(1, size)]
        for (i, _), counts in zip(part, unpack([member for _, member in part]), strict=True):
            found[i] = counts


def _unpack_heads(heads: Sequence["_Head"]) -> Sequence[Counts | ContractError]:
    """The counters of payloads of one shape."""
    if len(heads) > 1:
        return _unpack_alike(heads)
    try:
        return (_unpack_alone(heads[0]),)
    except ContractError as e:
        return (e,)


# ── byte planes ────────────────────────────────────────────────────────────────────────────────────────


def pack_planes(counts: Counts) -> bytes:
    """``(n,)`` counts of at least 0 as byte planes, which every minor reads: for what is kept or shown to others."""
    top = int(counts.max(initial=0))
    planes = max(1, (top.bit_length() + 7) // 8)
    raw = np.ascontiguousarray(counts.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :planes].T).tobytes()
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return bytes([planes]) + packer.compress(raw) + packer.flush()


def _inflate(data: bytes, max_counters: int) -> bytes:
    """The byte planes one after the other: as many bytes as whole counters have."""
    planes = data[0]
    limit = planes * max_counters
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        raw = inflater.decompress(data[1:], limit + 1)
    except zlib.error as e:
        raise ContractError(f"counts: damaged ({e})") from e
    if len(raw) > limit or not inflater.eof or inflater.unused_data or len(raw) % planes:
        raise ContractError(f"counts: not {planes} equal byte planes of at most {max_counters} counters")
    return raw


def _join_planes(planes: int, raws: Sequence[bytes]) -> list[Counts | ContractError]:
    """The counters of payloads of as many planes and bytes each."""
    table = np.frombuffer(b"".join(raws), np.uint8).reshape(len(raws), planes, -1)
    counts = table[:, 0].astype(np.int64)
    for plane in range(1, planes):
        counts |= table[:, plane].astype(np.int64) << 8 * plane
    if planes < 8 or not (counts < 0).any():
        return list(counts)
    return [ContractError("counts: a counter is beyond 2^63") if (one < 0).any() else one for one in counts]


# ── columns in step ────────────────────────────────────────────────────────────────────────────────────


def _pack_in_step(counts: Counts) -> bytes | None:
    """Scheme 9 with the best of the periods and columns tried; None when counters are too large for it."""
    if int(counts.max()) >= _LARGEST:
        return None
    # The score's column may have another size than the features', and classes come last: not all need be in step.
    tried = [
        (period, columns)
        for period in _periods(counts)
        for columns in range(max(1, counts.size // period - 2), counts.size // period + 1)
    ]
    return _write_in_step(counts, *min(tried, key=lambda plan: _estimate(counts, *plan)))


def _periods(counts: Counts) -> list[int]:
    """Up to two periods under which counters look like those a period before; 1 when there is none."""
    sample = np.log2(counts[:_MAX_SAMPLE] + 1.0)
    lags = min(MAX_PERIOD, sample.size // 3)
    if lags < 3:
        return [1]
    sample -= sample.mean()
    shifted = np.lib.stride_tricks.sliding_window_view(sample, sample.size - lags)
    likeness = shifted @ sample[:-lags]
    peaks = np.flatnonzero((likeness[1:-1] >= likeness[:-2]) & (likeness[1:-1] >= likeness[2:])) + 1
    if not peaks.size or likeness[peaks].max() <= 0:
        return [1]
    high = peaks[likeness[peaks] >= 0.8 * likeness[peaks].max()]
    return [int(period) for period in high[:2]]


def _differences(counts: Counts, period: int, columns: int) -> tuple[Counts, Counts, Counts]:
    """Folded differences: (period,) of the bases, (columns, period) of the table, (tail,) of the rest."""
    table = counts[: period * columns].reshape(columns, period)
    bases = np.partition(table, columns // 2, axis=0)[columns // 2]
    tail = np.diff(counts[period * columns :], prepend=0)
    return _fold(np.diff(bases, prepend=0)), _fold(table - bases), _fold(tail)


def _estimate(counts: Counts, period: int, columns: int) -> float:
    """About how many bits the numbers take."""
    head, table, tail = _differences(counts, period, columns)
    bits = period * (4 + np.log2(1 + head.mean())) + columns * np.log2(1 + 2 * table.mean(axis=0)).sum()
    return float(bits + tail.size * np.log2(1 + 2 * tail.mean()) if tail.size else bits)


def _write_in_step(counts: Counts, period: int, columns: int) -> bytes:
    head, table, tail = _differences(counts, period, columns)
    totals = counts[: period * columns].reshape(columns, period)[:, :-1].sum(axis=1)
    implied = total = 0
    if period > 2 and (totals == totals[0]).all():
        implied, total = 1 + int(table[:, :-1].sum(axis=0).argmax()), int(totals[0])
        table[:, implied - 1] = 0
    numbers = np.concatenate([head, table.T.reshape(-1), tail])
    sizes = np.array([period, *[columns] * period, tail.size])
    group_widths = _widths(numbers, sizes)
    widths = np.repeat(group_widths, sizes)
    present = np.flatnonzero(widths)
    low, numbers = widths[present] - 1, numbers[present]
    ends = np.cumsum((numbers >> low) + 1)
    rests = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
    rests[ends - 1] = 1
    shifts = low[:, None] - 1 - np.arange(int(low.max(initial=0)))
    low_bits = (numbers[:, None] >> np.maximum(shifts, 0) & 1)[shifts >= 0].astype(np.uint8)
    halves = np.append(group_widths, [0] * (group_widths.size % 2)).astype(np.uint8)
    return b"".join(
        (
            bytes([IN_STEP]),
            *(_leb128(value) for value in (counts.size, period, columns, implied, total)),
            (halves[::2] << 4 | halves[1::2]).tobytes(),
            np.packbits(np.concatenate([rests, low_bits])).tobytes(),
        )
    )


def _fold(differences: Counts) -> Counts:
    return (differences << 1) ^ (differences >> 63)


def _unfold(numbers: Counts) -> Counts:
    return (numbers >> 1) ^ -(numbers & 1)


def _widths(numbers: Counts, sizes: Counts) -> Counts:
    """``(groups,)`` the width that takes the fewest bits for each group of so many numbers."""
    filled = np.flatnonzero(sizes)
    starts = (np.cumsum(sizes) - sizes)[filled]
    low = np.arange(_MAX_WIDTH)[:, None]
    bits = np.add.reduceat(numbers >> low, starts, axis=1) + (low + 1) * sizes[filled]
    widths = np.zeros(sizes.size, np.int64)
    widths[filled] = np.where(np.add.reduceat(numbers, starts) > 0, 1 + bits.argmin(axis=0), 0)
    return widths


@dataclass(frozen=True, slots=True)
class _Head:
    """Scheme 9 up to its numbers: the shape, the widths' bytes, and the bytes of the numbers' bits."""

    period: int
    columns: int
    tail: int
    implied: int
    total: int
    halves: bytes
    bits: bytes


def _read_head(data: bytes, max_counters: int) -> _Head:
    count, at = _read_leb128(data, 1)
    period, at = _read_leb128(data, at)
    columns, at = _read_leb128(data, at)
    implied, at = _read_leb128(data, at)
    total, at = _read_leb128(data, at)
    if count > max_counters or not 1 <= period <= MAX_PERIOD or columns * period > count or implied >= period:
        raise ContractError(
            f"counts: {columns} columns of {period} in {count} counters, {implied} implied; at most {max_counters} "
            f"counters and columns of {MAX_PERIOD} are allowed"
        )
    end = at + (period + 3) // 2
    if end > len(data):
        raise ContractError("counts: cut short in the widths")
    return _Head(period, columns, count - columns * period, implied, total, data[at:end], data[end:])


def _unpack_alone(head: _Head) -> Counts:
    """The counters of one payload, in memory of a few times their own: it may be as large as messages come."""
    period, columns, tail = head.period, head.columns, head.tail
    halves = np.frombuffer(head.halves, np.uint8)
    group_widths = np.stack([halves >> 4, halves & 15], axis=1).reshape(-1)[: period + 2].astype(np.int64)
    sizes = np.full(period + 2, columns)
    sizes[0], sizes[-1] = period, tail
    numbers = _unfold(_read_numbers_alone(np.frombuffer(head.bits, np.uint8), np.repeat(group_widths, sizes)))
    counts = np.empty(columns * period + tail, np.int64)
    whole = columns * period
    bases = np.cumsum(numbers[:period])
    table = numbers[period : period + whole].reshape(period, columns) + bases[:, None]
    if head.implied:
        table[head.implied - 1] += head.total - table[:-1].sum(axis=0)
    counts[:whole] = table.T.reshape(-1)
    counts[whole:] = np.cumsum(numbers[period + whole :])
    if (counts < 0).any():
        raise ContractError("counts: a counter is below 0")
    return counts


def _read_numbers_alone(packed: NDArray[np.uint8], widths: Counts) -> Counts:
    """The folded numbers of these widths; refuses bits that are missing or left over."""
    present = np.flatnonzero(widths)
    low = widths[present] - 1
    bits = np.unpackbits(packed)
    ends = np.flatnonzero(bits)[: present.size]
    if ends.size < present.size:
        raise ContractError("counts: cut short in the numbers")
    rests = int(ends[-1]) + 1 if ends.size else 0
    used = rests + int(low.sum())
    if used > bits.size or bits.size - used >= 8 or bits[used:].any():
        raise ContractError(f"counts: {bits.size} bits where {used} are needed")
    rest = np.diff(ends, prepend=-1) - 1
    starts = rests + np.cumsum(low) - low
    # At most 14 low bits begin anywhere in a byte: three bytes hold them.
    padded = np.append(packed, np.zeros(3, np.uint8)).astype(np.int64)
    three = (padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:])[starts >> 3]
    found = rest << low | three >> (24 - (starts & 7) - low) & ((1 << low) - 1)
    numbers = np.zeros(widths.size, np.int64)
    numbers[present] = found
    return numbers


def _unpack_alike(heads: Sequence[_Head]) -> list[Counts | ContractError]:
    """The counters of payloads of one period, number of columns and length of the tail."""
    n, period, columns, tail = len(heads), heads[0].period, heads[0].columns, heads[0].tail
    halves = np.frombuffer(b"".join(head.halves for head in heads), np.uint8).reshape(n, -1)
    group_widths = np.empty((n, 2 * halves.shape[1]), np.int64)
    group_widths[:, ::2], group_widths[:, 1::2] = halves >> 4, halves & 15
    whole = columns * period
    widths = np.empty((n, period + whole + tail), np.int64)
    widths[:, :period] = group_widths[:, :1]
    widths[:, period : period + whole].reshape(n, period, columns)[...] = group_widths[
        :, 1 : period + 1, None
    ]
    widths[:, period + whole :] = group_widths[:, period + 1 : period + 2]
    numbers, problems = _read_numbers([head.bits for head in heads], widths)
    numbers = _unfold(numbers)
    counts = np.empty((n, whole + tail), np.int64)
    bases = np.cumsum(numbers[:, :period], axis=1)
    table = numbers[:, period : period + whole].reshape(n, period, columns) + bases[:, :, None]
    implied = np.array([head.implied for head in heads])
    filled = np.flatnonzero(implied)
    if filled.size:
        totals = np.array([head.total for head in heads])[filled, None]
        table[filled, implied[filled] - 1] += totals - table[filled, :-1].sum(axis=1)
    counts[:, :whole] = table.transpose(0, 2, 1).reshape(n, whole)
    np.cumsum(numbers[:, period + whole :], axis=1, out=counts[:, whole:])
    below = np.flatnonzero((counts < 0).any(axis=1)).tolist()
    found: list[Counts | ContractError] = []
    for i in range(n):
        problem = problems.get(i, "counts: a counter is below 0" if i in below else "")
        found.append(ContractError(problem) if problem else counts[i])
    return found


def _read_numbers(packed: Sequence[bytes], widths: Counts) -> tuple[Counts, dict[int, str]]:
    """The folded numbers (payloads, n) of these widths, and what is wrong with some payloads: bits that are missing or
    left over. Theirs are zeros.
    """
    problems: dict[int, str] = {}
    # At most 14 low bits begin anywhere in a byte: three bytes hold them, also behind the last.
    joined = np.frombuffer(b"".join(data + b"\0\0" for data in packed), np.uint8)
    lengths = np.array([len(data) for data in packed])
    first_bit = 8 * (np.cumsum(lengths + 2) - lengths - 2)
    ones = np.flatnonzero(np.unpackbits(joined).view(np.bool_))
    before = ones.searchsorted(first_bit)
    within = np.append(before[1:], ones.size) - before
    some_bits: NDArray[np.bool_] = widths.astype(np.bool_)
    wanted = some_bits.sum(axis=1)
    for i in np.flatnonzero(within < wanted):
        problems[int(i)] = "counts: cut short in the numbers"
        some_bits[i], wanted[i] = False, 0
    present = np.flatnonzero(some_bits)
    low = widths.reshape(-1)[present] - 1
    places = np.cumsum(wanted) - wanted
    ends = ones[np.arange(present.size) + np.repeat(before - places, wanted)]
    previous = np.append(-1, ends[:-1])
    some = wanted > 0
    previous[places[some]] = first_bit[some] - 1
    rests = np.zeros(len(packed), np.int64)
    rests[some] = ends[places[some] + wanted[some] - 1] + 1 - first_bit[some]
    sums = np.append(0, np.cumsum(low))
    used = rests + sums[places + wanted] - sums[places]
    left = 8 * lengths - used
    last = np.where(within > 0, ones[np.maximum(before + within - 1, 0)] if ones.size else 0, -1) - first_bit
    for i in np.flatnonzero((left < 0) | (left >= 8) | (last >= used)):
        problems.setdefault(int(i), f"counts: {8 * int(lengths[i])} bits where {int(used[i])} are needed")
    starts = np.repeat(first_bit + rests - sums[places], wanted) + sums[:-1]
    wide = joined.astype(np.int64)
    three = wide[:-2] << 16 | wide[1:-1] << 8 | wide[2:]
    at = np.minimum(starts >> 3, three.size - 1)  # beyond lie only those of payloads that have a problem
    numbers = np.zeros(widths.shape, np.int64)
    numbers.reshape(-1)[present] = (ends - previous - 1) << low | three[at] >> (24 - (starts & 7) - low) & (
        (1 << low) - 1
    )
    return numbers, problems


def _leb128(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _read_leb128(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(data):
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ContractError("counts: a length is cut short or larger than 2^35")
