"""Reading the metadata of an ONNX file without onnx: the few parts of its protobuf that are needed, and no more.

ModelProto.ir_version = 1, .opset_import = 8 (domain = 1, version = 2), .metadata_props = 14 (key = 1, value = 2).
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from collections.abc import Iterator
from typing import Final

from edge_runtime.contract.errors import ArtifactError

MAX_METADATA_BYTES: Final = 256 * 1024
FRAMING_BYTES: Final = 256
"""Allowed beside the keys and values: protobuf's tags and lengths."""
MAX_FIELDS: Final = 1 << 16


def read_metadata(model: bytes) -> tuple[dict[str, str], int, int]:
    """``metadata_props``, the opset of the default domain and the IR version; raises `ArtifactError`."""
    metadata: dict[str, str] = {}
    opset = ir_version = 0
    size = 0
    for number, value in _protobuf(memoryview(model)):
        if number == 1 and isinstance(value, int):
            ir_version = value
        elif number == 8 and isinstance(value, memoryview):
            parts = dict(_protobuf(value))
            domain, version = parts.get(1, b""), parts.get(2, 0)
            if (
                not isinstance(domain, int)
                and bytes(domain) in (b"", b"ai.onnx")
                and isinstance(version, int)
            ):
                opset = version
        elif number == 14 and isinstance(value, memoryview):
            size += len(value)
            if size > MAX_METADATA_BYTES + FRAMING_BYTES:
                raise ArtifactError(f"metadata is larger than the {MAX_METADATA_BYTES} bytes allowed")
            parts = dict(_protobuf(value))
            key, text = parts.get(1), parts.get(2, memoryview(b""))
            if isinstance(key, memoryview) and isinstance(text, memoryview):
                try:
                    metadata[str(key, "utf-8")] = str(text, "utf-8")
                except UnicodeDecodeError as e:
                    raise ArtifactError(f"metadata is not UTF-8 ({e})") from e
    return metadata, opset, ir_version


def _protobuf(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    position = fields = 0
    while position < len(data):
        fields += 1
        if fields > MAX_FIELDS:
            raise ArtifactError(f"not an ONNX file: more than {MAX_FIELDS} fields in one message")
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ArtifactError(f"not an ONNX file: unknown wire type {wire} at byte {position}")
        if number == 0 or position + length > len(data):
            raise ArtifactError(
                f"not an ONNX file, or cut short: field {number} at byte {position} runs past the end"
            )
        yield number, data[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ArtifactError(f"not an ONNX file, or cut short: bad number at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
