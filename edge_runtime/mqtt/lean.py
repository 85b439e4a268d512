"""Importing a library without what it imports for a case that cannot happen here."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def sparing(module: str, *, unless: str) -> Iterator[None]:
    """An empty ``module`` for whoever imports it meanwhile, unless the module ``unless`` is installed.

    Nothing is spared that is loaded already, and afterwards ``module`` can be imported as if nothing had been.
    """
    if module in sys.modules or importlib.util.find_spec(unless) is not None:
        yield
        return
    sys.modules[module] = ModuleType(module)
    try:
        yield
    finally:
        del sys.modules[module]
