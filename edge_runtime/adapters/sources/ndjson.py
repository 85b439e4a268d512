"""Rows and answers as lines of JSON: what an application in any language speaks with the daemon.

A request is one line: a bare row (an array of values, or an object of feature name and value) or an envelope,
``{"row": …}`` for one row and ``{"rows": […]}`` for a batch, with ``id`` and ``truth`` where wanted. **An object is an
envelope when its ``row`` or ``rows`` is an array or an object**: a feature's value never is one, so a model may have a
feature of either name. Every request that is not empty gets exactly one answer line, in the order of the requests.

The answers are strict JSON in ASCII: a score that is no finite number is ``null``. Requests may also carry the tokens
``NaN``, ``Infinity`` and ``-Infinity``, which Python and others write; ``null`` and ``NaN`` mean missing.

Nothing here reads or writes: sources do, and they know nothing of the runtime but a function that answers.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import InputError

MAX_LINE_BYTES: Final = 1 << 20
MAX_BATCH_ROWS: Final = 1024
"""An answer may be far longer than its request (1,000 classes for ``{}``), so the length of a line is no bound."""
MAX_ID_CHARS: Final = 256
MAX_MESSAGE_CHARS: Final = 400

_KEYS: Final = frozenset({"row", "rows", "id", "truth"})
_NESTED: Final = frozenset({list, dict})

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One row, or a batch of them, that wants an answer.

    Attributes:
        rows: what `Runtime.predict` takes: one row, or a list of rows when ``batch`` is set.
        batch: whether the answer is one of arrays.
        id: comes back with the answer.
        truth: the true label; for a batch a list of them. None is an unknown one. A list of labels for a model
            with several label outputs.
        arrived_ns: `time.perf_counter_ns` when the source read it; 0 where rows do not queue.
    """

    rows: Any
    batch: bool = False
    id: Scalar = None
    truth: Any = None
    arrived_ns: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says: ``label`` and ``score`` as in `Prediction`, and the SHA-256 of the ``model``."""

    label: Any
    score: NDArray[np.float32]
    model: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no answer.

    ``reason`` is that of an `InputError`, or ``json`` (no JSON in UTF-8), ``request`` (JSON, but no request),
    ``too_long``, ``truth`` (a label of another type than the model's), ``unavailable`` (no model, or it sheds load),
    ``failed`` (the model broke on it). ``id`` is that of the request where it could be read.
    """

    reason: str
    message: str
    id: Scalar = None


Reply = Answer | Refusal
Answerer = Callable[[Request | Refusal], Reply]
"""Answers a request; a refusal is counted and comes back as it is."""


class Lines:
    """Cuts a stream of bytes into lines; holds one unfinished line of at most ``max_bytes`` and no more.

    None stands for a line that is longer. It comes as soon as that is known; what follows, up to the end of that
    line, is dropped.
    """

    __slots__ = ("_max_bytes", "_skipping", "_tail")

    def __init__(self, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._tail = bytearray()
        self._skipping = False

    def push(self, data: bytes) -> Iterator[bytes | None]:
        """The lines that ``data`` ends, without their newline. Exhaust it before the next call."""
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            line = self._take(data[start:end])
            start = end + 1
            if self._skipping:
                self._skipping = False
            else:
                yield line
        if self._skipping:
            return
        self._tail += memoryview(data)[start:]
        if len(self._tail) > self._max_bytes:
            self._tail.clear()
            self._skipping = True
            yield None

    def end(self) -> Iterator[bytes | None]:
        """The last line, if it had no newline."""
        if self._tail:
            yield self._take(b"")

    def _take(self, piece: bytes) -> bytes | None:
        if self._tail:
            self._tail += piece
            piece = bytes(self._tail)
            self._tail.clear()
        return piece if len(piece) <= self._max_bytes else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(a for a, b in pairwise(names) if a == b)
        raise InputError("json", f"the key {twice!r:.80} stands twice in one object")
    return found


_decode: Final = json.JSONDecoder(object_pairs_hook=_unique).decode
_encode_strict: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def parse(line: bytes, arrived_ns: int = 0) -> Request | Refusal | None:
    """The request that a line is, or what is wrong with it; None for a blank line. Never raises."""
    id_: Scalar = None
    try:
        text = _text(line)
        if not text or text.isspace():
            return None
        found = _json(text)
        if not _is_envelope(found):
            _check_row(found)
            return Request(rows=found, arrived_ns=arrived_ns)
        id_ = _id(found)
        return _envelope(found, id_, arrived_ns)
    except InputError as e:
        return Refusal(e.reason, str(e), id_)


def _text(line: bytes) -> str:
    try:
        return line.decode().removeprefix("\ufeff")  # some writers begin their stream with a mark
    except UnicodeDecodeError as e:
        raise InputError("json", f"not UTF-8 at byte {e.start}") from e


def _json(text: str) -> Any:
    try:
        return _decode(text)
    except InputError:
        raise
    except RecursionError as e:
        raise InputError("json", "nested too deeply; a row is an array or an object of values") from e
    except ValueError as e:  # also an integer of more digits than Python reads
        raise InputError("json", f"not JSON: {e}") from e


def _is_envelope(found: Any) -> bool:
    return isinstance(found, dict) and (
        isinstance(found.get("row"), list | dict) or isinstance(found.get("rows"), list | dict)
    )


def _id(found: dict[str, Any]) -> Scalar:
    id_ = found.get("id")
    problem = ""
    if isinstance(id_, list | dict):
        problem = f"the id is {_named(id_)}; text, a number, true, false or null is needed"
    elif isinstance(id_, float) and not math.isfinite(id_):
        problem = f"the id is {id_}, which JSON cannot say"
    elif isinstance(id_, str) and len(id_) > MAX_ID_CHARS:
        problem = f"the id has {len(id_)} characters; {MAX_ID_CHARS} are allowed"
    if problem:
        raise InputError("request", problem)
    return cast("Scalar", id_)


def _envelope(found: dict[str, Any], id_: Scalar, arrived_ns: int) -> Request:
    unknown = found.keys() - _KEYS
    if unknown:
        raise InputError(
            "request", f"an envelope has no key {min(unknown)!r:.80}; row or rows, id and truth are allowed"
        )
    if "row" in found and "rows" in found:
        raise InputError("request", "row and rows in one envelope; give one of them")
    truth = found.get("truth")
    batch = "rows" in found
    if batch:
        _check_batch(found["rows"], truth)
        rows = found["rows"]
    else:
        rows = found["row"]
        _check_row(rows)
    for one in truth if batch and truth is not None else [truth]:
        _check_truth(one)
    return Request(rows=rows, batch=batch, id=id_, truth=truth, arrived_ns=arrived_ns)


def _check_batch(rows: Any, truth: Any) -> None:
    if not isinstance(rows, list):
        raise InputError("request", f"rows is {_named(rows)}; an array of rows is needed")
    if len(rows) > MAX_BATCH_ROWS:
        raise InputError("too_long", f"{len(rows)} rows in one line; {MAX_BATCH_ROWS} are allowed")
    for i, row in enumerate(rows):
        _check_row(row, f"row {i}: ")
    if truth is not None and not (isinstance(truth, list) and len(truth) == len(rows)):
        raise InputError("request", f"the truth of {len(rows)} rows is an array with as many entries")


def _check_row(row: Any, where: str = "") -> None:
    if not isinstance(row, list | dict):
        raise InputError(
            "request",
            f"{where}{_named(row)} is no row; send an array of values, an object of feature name and value, "
            'or {"row": …} or {"rows": […]}',
        )
    if not row and isinstance(row, list):
        raise InputError("width", f"{where}the row has no values")
    if _NESTED.isdisjoint(map(type, row.values() if isinstance(row, dict) else row)):
        return
    places = row.items() if isinstance(row, dict) else enumerate(row)
    place, value = next((place, value) for place, value in places if type(value) in _NESTED)
    raise InputError(
        "type",
        f"{where}value {place!r:.80} is {_named(value)}, not a number or a category "
        '(several rows go as {"rows": […]})',
    )


def _check_truth(truth: Any) -> None:
    labels = truth if isinstance(truth, list) else [truth]
    if not _NESTED.isdisjoint(map(type, labels)):
        raise InputError("request", "the truth is nested; a label is needed, or an array with one per output")


def _named(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return "text"
        case int() | float():
            return "a number"
        case list():
            return "an array"
        case _:
            return "an object"


def respond(line: bytes | None, answer: Answerer, *, arrived_ns: int, max_line_bytes: int) -> bytes:
    """The answer line for a line of `Lines`, with its newline; empty for a blank line.

    Never raises for what stands in the line; what ``answer`` raises goes through.
    """
    if line is None or len(line) > max_line_bytes:
        asked: Request | Refusal | None = Refusal(
            "too_long", f"the line is longer than {max_line_bytes} bytes"
        )
    else:
        asked = parse(line, arrived_ns)
    return b"" if asked is None else encode(asked.id, answer(asked))


def encode(id_: Scalar, reply: Reply) -> bytes:
    """The answer line, with its newline."""
    document: dict[str, Any] = {"id": id_}
    if isinstance(reply, Refusal):
        document["error"] = {"reason": reply.reason, "message": reply.message[:MAX_MESSAGE_CHARS]}
        return _encode_strict(document).encode() + b"\n"
    label = reply.label.tolist() if isinstance(reply.label, np.ndarray) else reply.label
    document |= {"label": label, "score": reply.score.tolist(), "model": reply.model}
    try:
        text = _encode_strict(document)
    except ValueError:
        text = _encode_strict(_finite(document))
    return text.encode() + b"\n"


def _finite(value: Any) -> Any:
    """``value`` with None for every number that JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
