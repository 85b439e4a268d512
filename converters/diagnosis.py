"""Which step of a pipeline its graph gets wrong: what a failed proof tells the person who has to change something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from converters.lowering.composition import chain
from converters.lowering.graph import Lowering, Value
from converters.lowering.rules import rule
from converters.signature import Signature
from edge_runtime.contract.errors import SkiffError


@dataclass(frozen=True, slots=True, eq=False)
class Until:
    """The first steps of a pipeline as a regressor, whose predictions are what the last of them makes of the rows."""

    steps: Sequence[tuple[str, Any]]

    def predict(self, X: Any) -> NDArray[np.float64]:
        """(n, W): what the steps make of ``X``."""
        made = Pipeline(list(self.steps)).transform(X)
        dense = made.toarray() if hasattr(made, "toarray") else made
        return np.asarray(dense, np.float64)


@rule("predict", Until)
def _until(g: Lowering, fitted: Until, x: Value) -> Value:
    return chain(g, fitted.steps, x)


def culprit(signature: Signature, disagrees: Callable[[Signature], bool]) -> str:
    """The first step after which graph and pipeline differ, as errors name it; the last step when all before agree.

    ``disagrees`` tells whether the graph of such a part of the pipeline differs from it on the worst rows.
    """
    fitted = signature.pipeline
    path: list[str] = []
    before: list[tuple[str, Any]] = []
    while True:
        if hasattr(fitted, "best_estimator_"):
            fitted = fitted.best_estimator_
        elif isinstance(fitted, Pipeline):
            *earlier, (name, last) = fitted.steps
            for step in earlier:
                before.append(step)
                if _differs(signature, before, disagrees):
                    return _named([*path, step[0]], step[1])
            path.append(name)
            fitted = last
        else:
            return _named(path, fitted)


def _differs(
    signature: Signature, steps: Sequence[tuple[str, Any]], disagrees: Callable[[Signature], bool]
) -> bool:
    part = Signature(
        pipeline=Until(tuple(steps)),
        task="regressor",
        score="predict",
        width=signature.width,
        names=signature.names,
        labels=(),
    )
    try:
        return disagrees(part)
    except (SkiffError, ValueError, TypeError):
        return False  # text between two steps is no number to compare


def _named(path: Sequence[str], step: Any) -> str:
    kind = type(step).__name__
    return f"step {'__'.join(path)!r} ({kind})" if path else kind
