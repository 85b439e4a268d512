"""Ranges of features from the words of a command line."""

from collections.abc import Sequence
from typing import Final

from converters.ranges import Ranges
from edge_runtime.contract.errors import ConfigError

TRAINING: Final = "training"


def parse_ranges(words: Sequence[str]) -> Ranges | None:
    """What ``words`` ask for: ``training``, or NAME=LOW:HIGH each, with an empty side for no limit; None for no words.

    Raises `ConfigError` for anything else, and for a feature that is named twice.
    """
    if not words:
        return None
    if TRAINING in words:
        if len(words) > 1:
            raise ConfigError("--range training stands alone: it gives every column of numbers its range")
        return TRAINING
    found: dict[str, tuple[float | None, float | None]] = {}
    for word in words:
        name, equals, ends = word.rpartition("=")
        low, colon, high = ends.partition(":")
        if not equals or not colon or not name or not low + high:
            raise ConfigError(
                f"--range {word!r} is neither 'training' nor NAME=LOW:HIGH (an empty side has no limit)"
            )
        if name in found:
            raise ConfigError(f"--range names {name!r} twice")
        found[name] = (_end(word, low), _end(word, high))
    return found


def _end(word: str, text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError as e:
        raise ConfigError(f"--range {word!r}: {text!r} is not a number") from e
