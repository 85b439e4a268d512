"""The ledger in a SQLite file: the kit, and what only a file can do."""

from functools import partial

import pytest

from aggregator.adapters.ledger import Ledger
from aggregator.stores import LedgerStore
from edge_runtime.contract.errors import ConfigError
from tests.support.ledger_kit import LedgerKit


class TestFile(LedgerKit):
    @pytest.fixture
    def opened(self, tmp_path):
        return partial(Ledger, tmp_path / "ledger.sqlite")


def as_protocol(ledger: Ledger) -> LedgerStore:
    return ledger  # mypy compares them


def test_there_is_no_reading_what_was_never_written(tmp_path):
    with pytest.raises(ConfigError, match="start the aggregator first"):
        Ledger(tmp_path / "none.sqlite", read_only=True)
    assert not (tmp_path / "none.sqlite").exists()


def test_what_is_no_database_is_refused(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database at all, but long enough to look at" * 20)
    with pytest.raises(ConfigError, match="cannot be opened as a store"):
        Ledger(path)


@pytest.mark.parametrize("url", ["mysql://host/db", "postgresql://host/db", "no url at all"])
def test_other_databases_are_refused_by_name(url):
    with pytest.raises(ConfigError, match="give 'postgresql\\+psycopg://"):
        Ledger(url)
