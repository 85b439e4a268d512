"""Ways to what the publisher signed: retained on the broker (`mqtt`), or as files on a web server (`https`).

Neither is believed: metadata is verified by the trust store, a model by its digest. A carrier bounds what it takes in
bytes and in time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from edge_runtime.contract.trust import Target

MAX_CARRIED_WORDS: Final = 200
"""Of what a peer says of itself, in a reason."""


class Carrier(Protocol):
    """One way. Times are monotonic seconds; both calls end by ``until``, and raise `LinkError` or `ContractError`."""

    @property
    def name(self) -> str:
        """What it is called in a reason."""

    def metadata(self, root_version: int, until: float) -> Callable[[str], bytes | None]:
        """The current metadata by file name, for whoever has verified the root up to ``root_version``.

        What is returned may fetch each file when it is asked for, and raise then.
        """

    def problem(self, target: Target) -> str:
        """Why this way cannot bring ``target``, without asking anybody; "" when it may."""

    def blob(self, target: Target, into: Path, until: float) -> None:
        """Makes the file ``into`` as long as ``target``, going on where it ends; its contents are anybody's guess.

        What came before an error stays in the file.
        """
