"""Arrow arrays as numpy arrays. Arrow's own conversion would import pandas, which takes longer than a replay may."""

import math
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import InputError


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


def plain(chunked: Any, where: str) -> Any:
    """One array of values, not of references to them; text however it is stored, bytes and UUIDs as text, too.

    Raises `InputError` for bytes that are no text.
    """
    import pyarrow as pa

    kinds = pa.types
    array = chunked.combine_chunks() if chunked.num_chunks != 1 else chunked.chunk(0)
    if kinds.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if isinstance(array.type, pa.BaseExtensionType):
        array = _uuids(array.storage) if array.type.extension_name == "arrow.uuid" else array.storage
    kind = array.type
    if kinds.is_fixed_size_binary(kind):
        array = array.cast(pa.binary())
    try:
        if kinds.is_large_binary(kind):
            return array.cast(pa.large_string())
        if kinds.is_binary(array.type) or kinds.is_binary_view(kind) or kinds.is_string_view(kind):
            return array.cast(pa.string())
    except pa.ArrowInvalid as e:
        raise InputError("type", f"{where}: holds {kind} that is not UTF-8 text; write it as text") from e
    return array


def _uuids(storage: Any) -> Any:
    """UUIDs of 16 bytes as they are written."""
    import pyarrow as pa

    found = storage.dictionary_encode()
    texts = [str(UUID(bytes=value)) for value in found.dictionary.to_pylist()]
    return pa.array(texts, pa.string()).take(found.indices)


def encoded(array: Any, where: str) -> tuple[list[Any], NDArray[np.int64]]:
    """The distinct values, None among them where one is missing, and each row's place among these.

    Raises `InputError` for lists and structs, which name nothing.
    """
    import pyarrow as pa

    try:
        found = array.dictionary_encode(null_encoding="encode")
    except pa.ArrowNotImplementedError as e:
        raise InputError(
            "type", f"{where}: holds {array.type}; names, categories and labels are text or numbers"
        ) from e
    return found.dictionary.to_pylist(), numbers(found.indices)
