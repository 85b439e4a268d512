"""A validator for the part of JSON Schema 2020-12 that the device's schema uses; any other keyword is an error."""

import math
import re
from typing import Any

ANNOTATIONS = {"$schema", "title", "description", "default"}


def is_valid(schema: Any, value: Any) -> bool:
    """Whether ``value`` satisfies ``schema``."""
    return all(
        _KEYWORDS[keyword](schema, argument, value)
        for keyword, argument in schema.items()
        if keyword not in ANNOTATIONS | {"then"}
    )


def _type(_: Any, name: str, value: Any) -> bool:
    match name:
        case "object":
            return isinstance(value, dict)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":  # stricter than the standard, which cannot tell 5.0 from 5; TOML and the reader can
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":  # JSON has neither infinities nor NaN
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    raise AssertionError(f"unknown type {name}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _properties(_: Any, table: dict[str, Any], value: Any) -> bool:
    return not isinstance(value, dict) or all(is_valid(table[k], v) for k, v in value.items() if k in table)


def _additional(schema: Any, rest: Any, value: Any) -> bool:
    if not isinstance(value, dict):
        return True
    others = [v for k, v in value.items() if k not in schema.get("properties", {})]
    return not others if rest is False else all(is_valid(rest, v) for v in others)


def _if(schema: Any, condition: Any, value: Any) -> bool:
    return not is_valid(condition, value) or is_valid(schema["then"], value)


_KEYWORDS = {
    "type": _type,
    "enum": lambda _, options, value: any(_same(option, value) for option in options),
    "const": lambda _, wanted, value: _same(wanted, value),
    "minimum": lambda _, low, value: not _number(value) or value >= low,
    "maximum": lambda _, high, value: not _number(value) or value <= high,
    "minLength": lambda _, length, value: not isinstance(value, str) or len(value) >= length,
    "maxLength": lambda _, length, value: not isinstance(value, str) or len(value) <= length,
    # ECMA's `$` is the very end, Python's also comes before a last line break.
    "pattern": lambda _, pattern, value: (
        not isinstance(value, str) or re.search(re.sub(r"\$$", r"\\Z", pattern), value) is not None
    ),
    "required": lambda _, names, value: not isinstance(value, dict) or set(names) <= value.keys(),
    "properties": _properties,
    "additionalProperties": _additional,
    "allOf": lambda _, parts, value: all(is_valid(part, value) for part in parts),
    "not": lambda _, part, value: not is_valid(part, value),
    "if": _if,
}
