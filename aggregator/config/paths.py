"""Paths in the file are relative to the file."""

from pathlib import Path


def resolved(text: str, folder: Path) -> Path:
    """``text`` as a path, relative to ``folder``, the configuration file's."""
    return (folder / Path(text).expanduser()).resolve()
