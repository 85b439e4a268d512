"""Reading untrusted mappings field by field: every refusal names the path, what was found and what is allowed.

Messages, manifests and configuration files are all read through `Fields`, so that the rules for types,
ranges and unknown keys stand in one place.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, TypeVar, cast

from edge_runtime.contract.errors import ContractError, SkiffError

T = TypeVar("T")

MAX_LIKENED: Final = 256
"""A longer name is likened to none: the time that takes grows with its length, which a stranger chooses."""


class _Required:
    """Marks a field without a default."""


REQUIRED = _Required()


def nearest(name: str, valid: Sequence[str], question: str = "did you mean {}?") -> str:
    """`` (did you mean 'x'?)`` for the closest valid name, or an empty string; ``question`` is asked instead."""
    import difflib  # noqa: PLC0415 (half a megabyte for a message that a device may never need)

    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5) if len(name) <= MAX_LIKENED else []
    return f" ({question.format(repr(close[0]))})" if close else ""


class Fields:
    """One mapping being read; ``path`` is where it stands in its document, for messages.

    Raises the given error family on a missing field, a wrong type, a value out of range, and, when
    `finish` is called, on a key that nobody asked for.
    """

    __slots__ = ("_error", "_mapping", "_path", "_seen")

    def __init__(self, mapping: object, path: str, error: type[SkiffError] = ContractError) -> None:
        self._error = error
        self._path = path
        if not isinstance(mapping, Mapping):
            raise error(f"{path}: expected a table of named fields, got {_describe(mapping)}")
        self._mapping = cast("Mapping[str, object]", mapping)
        self._seen: list[str] = []

    @property
    def path(self) -> str:
        """Where this mapping stands in its document."""
        return self._path

    def peek(self, name: str) -> object:
        """The value as it stands, unchecked; None when it is missing."""
        return self._mapping.get(name)

    def fail(self, name: str, problem: str) -> SkiffError:
        """An error of this reader's family that points at ``name``."""
        return self._error(f"{self._path}.{name}: {problem}")

    def _get(self, name: str, default: object) -> object:
        self._seen.append(name)
        value = self._mapping.get(name, default)
        if value is REQUIRED:
            raise self.fail(name, f"is missing{nearest(name, self.names(), 'is {} meant for it?')}")
        return value

    def text(
        self,
        name: str,
        default: str | _Required = REQUIRED,
        *,
        max_length: int = 1024,
        pattern: re.Pattern[str] | None = None,
        choices: Sequence[str] | None = None,
    ) -> str:
        """A string of at most ``max_length`` characters, matching ``pattern`` or one of ``choices``."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.fail(name, f"expected text, got {_describe(value)}")
        if len(value) > max_length:
            raise self.fail(name, f"is {len(value)} characters long; at most {max_length} are allowed")
        if not _encodable(value):
            raise self.fail(name, "holds half of a surrogate pair, which is not text")
        if pattern is not None and not pattern.fullmatch(value):
            raise self.fail(name, f"{value!r} does not match {pattern.pattern}")
        if choices is not None and value not in choices:
            raise self.fail(name, f"{value!r} is not one of {', '.join(choices)}{nearest(value, choices)}")
        return value

    def integer(
        self, name: str, default: int | _Required = REQUIRED, *, low: int = 0, high: int = 2**63 - 1
    ) -> int:
        """An integer in ``[low, high]``; booleans and floats are refused."""
        value = self._get(name, default)
        if type(value) is int and low <= value <= high:
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(name, f"expected a whole number, got {_describe(value)}")
        if not low <= value <= high:
            raise self.fail(name, f"{value} is outside [{low}, {high}]")
        return value

    def number(
        self,
        name: str,
        default: float | _Required = REQUIRED,
        *,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> float:
        """A finite number in ``[low, high]``."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(name, f"expected a number, got {_describe(value)}")
        number = _float(value)
        if not math.isfinite(number) or not low <= number <= high:
            raise self.fail(name, f"{number} is not a finite number in [{low}, {high}]")
        return number

    def flag(self, name: str, default: bool | _Required = REQUIRED) -> bool:  # noqa: FBT001 (like its siblings)
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, f"expected true or false, got {_describe(value)}")
        return value

    def blob(self, name: str, default: bytes | _Required = REQUIRED, *, max_length: int = 1 << 20) -> bytes:
        """Bytes, at most ``max_length`` of them."""
        value = self._get(name, default)
        if not isinstance(value, bytes):
            raise self.fail(name, f"expected bytes, got {_describe(value)}")
        if len(value) > max_length:
            raise self.fail(name, f"holds {len(value)} bytes; at most {max_length} are allowed")
        return value

    def items(self, name: str, default: Sequence[object] | _Required = REQUIRED) -> list[object]:
        """A list of anything; the caller checks each item."""
        value = self._get(name, default)
        if not isinstance(value, list | tuple):
            raise self.fail(name, f"expected a list, got {_describe(value)}")
        return list(value)

    def texts(self, name: str, default: Sequence[str] | _Required = REQUIRED) -> tuple[str, ...]:
        """A list of strings."""
        return tuple(self._each(name, self.items(name, default), str, "text"))

    def integers(self, name: str, default: Sequence[int] | _Required = REQUIRED) -> tuple[int, ...]:
        """A list of integers of at least 0."""
        items = self.items(name, default)
        if set(map(type, items)) <= {int}:
            numbers = cast("list[int]", items)
            if min(numbers, default=0) >= 0 and max(numbers, default=0) < 2**63:
                return tuple(numbers)
        found = tuple(self._each(name, items, int, "a whole number"))
        for i, value in enumerate(found):
            if isinstance(value, bool) or not 0 <= value < 2**63:
                raise self.fail(f"{name}[{i}]", f"{value} is not a whole number in [0, 2^63)")
        return found

    def numbers(self, name: str, default: Sequence[float] | _Required = REQUIRED) -> tuple[float, ...]:
        """A list of finite numbers."""
        found = []
        for i, value in enumerate(self.items(name, default)):
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(_float(value))
            ):
                raise self.fail(f"{name}[{i}]", f"expected a finite number, got {_describe(value)}")
            found.append(float(value))
        return tuple(found)

    def pairs(
        self, name: str, default: Mapping[str, object] | _Required = REQUIRED
    ) -> tuple[tuple[str, str], ...]:
        """A table of text to text, sorted by key."""
        section = self.section(name, default)
        return tuple(sorted((key, section.text(key)) for key in section.names()))

    def counts(
        self, name: str, default: Mapping[str, object] | _Required = REQUIRED
    ) -> tuple[tuple[str, int], ...]:
        """A table of text to counts, sorted by key."""
        section = self.section(name, default)
        return tuple(sorted((key, section.integer(key)) for key in section.names()))

    def section(self, name: str, default: Mapping[str, object] | _Required = REQUIRED) -> "Fields":
        """A nested table."""
        return Fields(self._get(name, default), f"{self._path}.{name}", self._error)

    def sections(self, name: str, default: Sequence[object] | _Required = REQUIRED) -> Iterator["Fields"]:
        """A list of nested tables."""
        for i, item in enumerate(self.items(name, default)):
            yield Fields(item, f"{self._path}.{name}[{i}]", self._error)

    def names(self) -> list[str]:
        """Every key of the mapping; refuses keys that are not text."""
        for key in cast("Mapping[object, object]", self._mapping):
            if not isinstance(key, str) or not _encodable(key):
                raise self._error(f"{self._path}: key {key!r:.80} is not text")
        return list(self._mapping)

    def finish(self) -> None:
        """Refuses keys nobody asked for, naming the nearest valid one."""
        for key in self.names():
            if key not in self._seen:
                valid = sorted(set(self._seen))
                hint = nearest(key, valid)
                raise self._error(f"{self._path}: unknown key {key!r}{hint}; valid keys: {', '.join(valid)}")

    def _each(self, name: str, values: Sequence[object], kind: type[T], what: str) -> Iterator[T]:
        for i, value in enumerate(values):
            if not isinstance(value, kind):
                raise self.fail(f"{name}[{i}]", f"expected {what}, got {_describe(value)}")
            yield value


def _float(value: float) -> float:
    """A number as a float; a whole number beyond every float becomes infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _encodable(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8: JSON can smuggle in half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe(value: object) -> str:
    if isinstance(value, str | bytes | list | tuple | Mapping):
        return f"{type(value).__name__} of length {len(value)}"
    return f"{type(value).__name__} {value!r}"[:80]
