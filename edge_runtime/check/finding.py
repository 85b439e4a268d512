"""What a check found, as a value."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """``ok``; ``warning``: works, but look; ``error``: the device would fail."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence of what was seen, where (a key of the configuration or a path), and what to do about it."""

    level: Level
    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        advice = f"; {self.remedy}" if self.remedy else ""
        return f"{self.level.upper():<7} {self.where}: {self.what}{advice}"


def ok(where: str, what: str) -> Finding:
    """All is well."""
    return Finding(Level.OK, where, what)


def warning(where: str, what: str, remedy: str) -> Finding:
    """It works, and somebody should know."""
    return Finding(Level.WARNING, where, what, remedy)


def error(where: str, what: str, remedy: str) -> Finding:
    """The device would fail."""
    return Finding(Level.ERROR, where, what, remedy)
