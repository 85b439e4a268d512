"""Which rule lowers which method of which estimator. Families add theirs with `rule`."""

from collections.abc import Callable
from typing import Final

from converters.lowering.graph import Rule

RULES: Final[dict[tuple[type, str], Rule]] = {}


def rule(method: str, *kinds: type) -> Callable[[Rule], Rule]:
    """Registers a function as the rule for ``method`` of exactly these types; subclasses may answer otherwise."""

    def register(function: Rule) -> Rule:
        for kind in kinds:
            assert (kind, method) not in RULES, f"two rules for {kind.__name__}.{method}"
            RULES[kind, method] = function
        return function

    return register
