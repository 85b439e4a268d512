"""What the store's parts share."""

from aggregator.adapters.database import File
from edge_runtime.contract.codec import decode
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.messages import Window


class Part:
    """Some of the store's methods; all parts share one file."""

    def __init__(self, db: File) -> None:
        self._db = db

    def _count(self, name: str, by: int) -> None:
        if by:
            self._db.execute(
                "INSERT INTO counters VALUES (?,?) ON CONFLICT (name) DO UPDATE SET value=value+excluded.value",
                (name, by),
            )


def read_window(payload: bytes) -> Window:
    """The window that came as ``payload``."""
    message = decode(payload)
    if not isinstance(message, Window):
        raise ContractError(f"the store holds a {type(message).__name__} where a window belongs")
    return message
