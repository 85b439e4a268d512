"""Digests as people give them: whole, or as much of the beginning as tables show."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from aggregator.adapters.registry import ARTIFACT
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import Digest

BEGINNING: Final = re.compile(r"[0-9a-f]{8,63}")
"""Long enough that nobody means another model by a slip; `skiff fleet` shows 12."""


def digest_among(known: Iterable[str], text: str) -> Digest:
    """The digest that ``text`` is, or the only one of ``known`` that begins with it.

    Raises:
        ConfigError: several begin so, or none.
        ContractError: ``text`` is neither.
    """
    if not BEGINNING.fullmatch(text):
        return ids.digest(text)
    match sorted({digest for digest in known if digest.startswith(text)}):
        case [only]:
            return Digest(only)
        case []:
            raise ConfigError(f"{text}: no published model's digest begins so; give all 64 characters")
        case several:
            raise ConfigError(f"{text}: begins the digests of {len(several)} models: {', '.join(several)}")


def published_in(registry: Path) -> list[str]:
    """The digests that the files of a registry are named by."""
    return [match[1] for path in registry.rglob("*.onnx") if (match := ARTIFACT.fullmatch(path.name))]
