"""Profiles of rows, as a device counts them, and cells as training cuts them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.profile import Binner, CellSpec, FeatureCells, Profile, cells_from_training

Matrix = NDArray[np.float64] | NDArray[np.float32]


def cells(X: Matrix, names: Sequence[str], classes: int = 0) -> CellSpec:
    """The layout that training on ``X`` (n, F) gives, but for the score's cells; a regressor has 0 ``classes``."""
    columns = tuple(cells_from_training(name, X[:, j]) for j, name in enumerate(names))
    return CellSpec(columns, FeatureCells("score", (0.0,)), classes)


def counted(spec: CellSpec, X: Matrix) -> Profile:
    """What a device that saw ``X`` (n, F) sends, if its model always answers 0."""
    binner = Binner(spec, probabilities=False)
    binner.observe(X, np.zeros(len(X), np.int64), np.zeros(len(X), np.float32))
    return binner.take()
