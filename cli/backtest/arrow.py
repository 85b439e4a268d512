"""Arrow arrays as numpy arrays. Arrow's own conversion would import pandas, which takes longer than a replay may."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def numbers(array: Any) -> NDArray[Any]:
    """The values (n,) of an Arrow array of integers or floats, those that are missing as NaN; maybe its own memory."""
    import pyarrow as pa

    if pa.types.is_float16(array.type) or (array.null_count and not pa.types.is_floating(array.type)):
        array = array.cast(pa.float64(), safe=False)
    if array.null_count:
        array = array.fill_null(math.nan)
    return np.from_dlpack(array)


def missing(array: Any) -> NDArray[np.bool_]:
    """(n,) which values are missing."""
    import pyarrow as pa

    return np.asarray(np.from_dlpack(array.is_null().cast(pa.uint8())), np.bool_)
