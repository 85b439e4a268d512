"""Rules that turn each fitted estimator into ONNX operators, one module per family, and `lower`, which applies them."""

from converters.lowering import (  # noqa: F401 - each registers its rules
    bayes,
    boosting,
    clusters,
    composition,
    coupling,
    donors,
    encoding,
    expansion,
    functions,
    gaussian_process,
    imputing,
    kernels,
    leaves,
    linear,
    meta,
    multiple,
    neighbors,
    neural,
    projection,
    scaling,
    selection,
    target,
    trees,
)
from converters.lowering.entry import lower

__all__ = ["lower"]
