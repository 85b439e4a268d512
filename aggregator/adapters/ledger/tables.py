"""The ledger's tables, as the newest version has them. Times are nanoseconds since 1970; documents are JSON text."""

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Dialect,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    select,
    text,
)
from sqlalchemy.types import TypeEngine


class Words(TypeDecorator[str]):
    """Text that compares by its bytes everywhere. PostgreSQL cannot keep a NUL character: U+FFFD stands for it."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """PostgreSQL would else sort by the database's locale."""
        plain = Text(collation="C") if dialect.name == "postgresql" else Text()
        return dialect.type_descriptor(plain)

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """What is sent to the database."""
        del dialect
        return value if value is None else value.replace("\0", "\ufffd")


Number: Final = BigInteger().with_variant(Integer(), "sqlite")

metadata: Final = MetaData()


def words(name: str, *, key: bool = False, default: str | None = None) -> Column[str]:
    """A column of text."""
    server = None if default is None else f"'{default}'"
    return _column(name, Words(), key=key, default=server)


def number(name: str, *, key: bool = False, default: int | None = None) -> Column[int]:
    """A column of whole numbers below 2^63."""
    return _column(name, Number, key=key, default=None if default is None else str(default))


def _column(name: str, kind: TypeEngine[Any], *, key: bool, default: str | None) -> Column[Any]:
    return Column(
        name, kind, primary_key=key, nullable=False, server_default=None if default is None else text(default)
    )


devices: Final = Table(
    "devices",
    metadata,
    words("device", key=True),
    words("session"),
    number("seq"),
    number("online"),
    words("attributes"),
    words("models"),
    number("last_seen_ns"),
    words("ended"),
    number("doubted_ns"),
    words("last_exit", default=""),
    number("restarts", default=0),
    words("clock", default=""),
    sqlite_with_rowid=False,
)
tracks: Final = Table(
    "tracks",
    metadata,
    words("cohort", key=True),
    words("model", key=True),
    Column("release", LargeBinary()),
    Column("rollout", Words()),
    sqlite_with_rowid=False,
)
revisions: Final = Table(
    "revisions", metadata, words("cohort", key=True), number("revision"), sqlite_with_rowid=False
)
rollouts: Final = Table(
    "rollouts",
    metadata,
    words("rollout", key=True),
    words("cohort"),
    words("model"),
    words("state"),
    number("created_ns"),
    words("document"),
    sqlite_with_rowid=False,
)
audit: Final = Table(
    "audit",
    metadata,
    number("id", key=True),
    number("at_ns"),
    words("who"),
    words("what"),
    words("why"),
    words("cohort"),
    words("model"),
    words("rollout"),
)
requests: Final = Table(
    "requests",
    metadata,
    number("id", key=True),
    words("kind"),
    words("document"),
    words("who"),
    words("why"),
    number("created_ns"),
    words("state", default="pending"),
    words("answer", default=""),
)
verdicts: Final = Table(
    "verdicts",
    metadata,
    words("digest", key=True),
    words("cohort", key=True),
    words("kind", key=True),
    words("model"),
    number("at_ns"),
    words("outcome"),
    words("reason"),
    words("document"),
    sqlite_with_rowid=False,
)
looks: Final = Table(
    "looks",
    metadata,
    words("digest", key=True),
    number("look", key=True),
    words("model"),
    number("at_ns"),
    number("devices"),
    number("row_count"),
    words("document"),
    number("newest", default=0),
    sqlite_with_rowid=False,
)
first_looks: Final = Table(
    "first_looks",
    metadata,
    words("digest", key=True),
    number("look", key=True),
    words("device", key=True),
    words("document"),
    sqlite_with_rowid=False,
)
traces: Final = Table(
    "traces",
    metadata,
    words("digest", key=True),
    words("cohort", key=True),
    words("column_key", key=True),
    words("model"),
    number("streak"),
    number("clear"),
    Column("incident", Number),
    sqlite_with_rowid=False,
)
cursors: Final = Table(
    "cursors",
    metadata,
    words("digest", key=True),
    words("device", key=True),
    number("last"),
    sqlite_with_rowid=False,
)
label_cursors: Final = Table(
    "label_cursors",
    metadata,
    words("digest", key=True),
    words("device", key=True),
    number("last"),
    sqlite_with_rowid=False,
)
incidents: Final = Table(
    "incidents",
    metadata,
    number("id", key=True),
    words("model"),
    words("digest"),
    words("cohort"),
    words("column_key"),
    words("kind"),
    words("severity"),
    number("opened_ns"),
    number("updated_ns"),
    Column("closed_ns", Number),
    words("closed_why", default=""),
    Column("acknowledged_ns", Number),
    words("acknowledged_by", default=""),
    words("document"),
)
tellings: Final = Table(
    "tellings",
    metadata,
    number("id", key=True),
    words("sink"),
    number("incident"),
    number("at_ns"),
    words("document"),
    sqlite_autoincrement=True,
)
"""Alarm events that a sink has not taken yet. Numbers are never given twice: whoever asks goes on from the last."""
retrains: Final = Table(
    "retrains",
    metadata,
    number("id", key=True),
    words("model"),
    words("digest"),
    words("cohort"),
    number("created_ns"),
    words("why"),
    words("document"),
    words("state"),
    Column("exit_code", Number),
    words("output", default=""),
    Column("ended_ns", Number),
)
lease: Final = Table(
    "lease",
    metadata,
    number("id", key=True),
    words("holder"),
    number("term"),
    number("beat"),
)


def _some(name: str, on: tuple[Column[Any], ...], where: Any, *, unique: bool = False) -> None:
    Index(name, *on, unique=unique, sqlite_where=where, postgresql_where=where)


_some("requests_pending", (requests.c.id,), requests.c.state == "pending")
_some(
    "incidents_open",
    (incidents.c.digest, incidents.c.cohort, incidents.c.column_key),
    incidents.c.closed_ns.is_(None),
    unique=True,
)

LISTED: Final = {
    "audit": select(audit).order_by(audit.c.id.desc()),
    "rollouts": select(rollouts).order_by(rollouts.c.created_ns.desc(), rollouts.c.rollout),
    "verdicts": select(verdicts).order_by(
        verdicts.c.at_ns.desc(), verdicts.c.digest, verdicts.c.cohort, verdicts.c.kind
    ),
    "looks": select(looks).order_by(looks.c.at_ns.desc(), looks.c.digest),
    "incidents": select(incidents).order_by(incidents.c.id.desc()),
    "open_incidents": select(incidents)
    .where(incidents.c.closed_ns.is_(None))
    .order_by(incidents.c.id.desc()),
    "tellings": select(tellings).order_by(tellings.c.id.desc()),
    "retrains": select(retrains).order_by(retrains.c.id.desc()),
    "requests": select(requests).order_by(requests.c.id.desc()),
    "look_times": select(looks.c.digest, looks.c.look, looks.c.at_ns, looks.c.newest).order_by(
        looks.c.at_ns.desc(), looks.c.digest
    ),
    "verdict_outcomes": select(verdicts.c.kind, verdicts.c.outcome).order_by(verdicts.c.at_ns.desc()),
    "open_severities": select(incidents.c.kind, incidents.c.severity)
    .where(incidents.c.closed_ns.is_(None))
    .order_by(incidents.c.id.desc()),
    "retrain_states": select(retrains.c.state).order_by(retrains.c.id.desc()),
}
"""What `Ledger.table` shows, newest first: to people; without documents, which are long, to programs."""

PARSED: Final = ("document",)
"""Columns of JSON that `Ledger.table` parses."""
