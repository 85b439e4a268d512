"""The control state: devices, releases, rollouts, the audit log, verdicts and incidents, retrain requests, orders.

The service is its one writer, except for `request`, with which the command line leaves an order. It is kept in a SQLite
file or, by the same code, in a PostgreSQL database. To add a table: define it in `tables`, add a step to `steps` and
raise `VERSION` there, and write its methods into the part they belong to.
"""

from pathlib import Path

from aggregator.adapters.ledger.control import Control
from aggregator.adapters.ledger.database import Database, exists
from aggregator.adapters.ledger.drift import Drift
from aggregator.adapters.ledger.dump import dump, load
from aggregator.adapters.ledger.lease import Leases
from aggregator.adapters.ledger.steps import VERSION
from aggregator.adapters.ledger.tellings import Tellings

__all__ = ["VERSION", "Ledger", "dump", "exists", "load"]


class Ledger(Control, Drift, Tellings, Leases):
    """The ledger at ``where``: the path of a SQLite file, or the URL of a PostgreSQL database.

    ``read_only`` is for another process that only asks. Every ``put_`` method belongs in a `transaction`. Methods raise
    `StoreError` with nothing kept when the database fails. Not thread-safe.

    Raises:
        ConfigError: it cannot be opened, is not there (read-only), or is of another version.
    """

    def __init__(self, where: Path | str, *, read_only: bool = False) -> None:
        super().__init__(Database(where, read_only=read_only))
