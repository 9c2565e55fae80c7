"""The tables of the service's database.

`migrations/` makes them; a test compares the two. What this file says in addition, the migrations say in SQL:
audit, ledger and events are append-only, by triggers.
"""

import json
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)

from orchestrator.budget import Amounts


class AnyText(TypeDecorator[str]):
    """Text of whatever a user may send. As bytes, because PostgreSQL's texts may hold no NUL, and no driver
    takes half a character.
    """

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> bytes | None:
        """To the database."""
        return None if value is None else value.encode("utf-8", "surrogatepass")

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> str | None:
        """From the database."""
        return None if value is None else value.decode("utf-8", "surrogatepass")


class JsonText(TypeDecorator[Any]):
    """A JSON value in ASCII, which every database takes as it is; nothing inside is ever asked for."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: object, dialect: Dialect) -> str:
        """To the database."""
        return json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> object:
        """From the database."""
        return None if value is None else json.loads(value)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only where the type is exactly INTEGER.
_Number = BigInteger().with_variant(Integer(), "sqlite")


def _amounts(prefix: str = "") -> list[Column[int]]:
    return [
        Column(prefix + unit, BigInteger, nullable=False, server_default=text("0"))
        for unit in Amounts._fields
    ]


def amounts_of(row: Any, prefix: str = "") -> Amounts:
    """What stands in the columns that `_amounts` made."""
    return Amounts(*(int(getattr(row, prefix + unit)) for unit in Amounts._fields))


def amounts_as(amounts: Amounts, prefix: str = "") -> dict[str, int]:
    """Values for those columns."""
    return {prefix + unit: amount for unit, amount in amounts._asdict().items()}


tenants = Table(
    "tenants",
    metadata,
    Column("tenant_id", String, primary_key=True),
    Column("name", AnyText, nullable=False),
    Column("rules", JsonText, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("removed_at", Double),
)
"""A removed one keeps its row: the ledger has to mean somebody."""
Index(
    "uq_tenants_name",
    tenants.c.name,
    unique=True,
    sqlite_where=tenants.c.removed_at.is_(None),
    postgresql_where=tenants.c.removed_at.is_(None),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", String, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False, index=True),
    Column("key_sha256", LargeBinary, nullable=False, unique=True),
    Column("role", String, nullable=False),
    Column("hint", String, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double),
)

operator_keys = Table(
    "operator_keys",
    metadata,
    Column("key_id", String, primary_key=True),
    Column("key_sha256", LargeBinary, nullable=False, unique=True),
    Column("hint", String, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double),
)
"""A table of their own: no slip in a query can make one of them a tenant's, or a tenant's one of them."""

contexts = Table(
    "contexts",
    metadata,
    Column("context_id", String, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("name", AnyText, nullable=False),
    Column("sha256", String, nullable=False),
    Column("length_bytes", BigInteger, nullable=False),
    Column("home", String, nullable=False, index=True),
    Column("created_at", Double, nullable=False),
    Column("is_complete", Boolean, nullable=False),
    Column("is_inline", Boolean, nullable=False),
    UniqueConstraint("tenant_id", "sha256", "length_bytes", "name", "home"),
    Index(None, "tenant_id", "created_at", "context_id"),
)

doomed_contexts = Table(
    "doomed_contexts",
    metadata,
    Column("context_id", String, primary_key=True),
    Column("tenant_id", String, nullable=False),
    Column("name", AnyText, nullable=False),
    Column("home", String, nullable=False, index=True),
)
"""Of contexts that were deleted, while the disk of their home still has the file."""

homes = Table(
    "homes",
    metadata,
    Column("home", String, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("heard_until", Double, nullable=False),
    Column("settler", String),
)
"""State directories and their servers. See `HomeBook`."""

rooms = Table(
    "rooms",
    metadata,
    Column("tenant_id", ForeignKey("tenants.tenant_id", ondelete="CASCADE"), primary_key=True),
    Column("home", String, primary_key=True, index=True),
    Column("units", BigInteger, nullable=False),
    Column("chains", BigInteger, nullable=False),
    Column("wants", BigInteger, nullable=False),
    Column("turn", BigInteger, nullable=False),
)
"""Sandboxes of tenants that have a limit of them, by server. See `fair_rooms`."""

runs = Table(
    "runs",
    metadata,
    Column("run_id", String, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("idempotency_key", AnyText, nullable=False),
    Column("request_hash", String, nullable=False),
    Column("context_id", String, nullable=False, index=True),
    Column("options", JsonText, nullable=False),
    Column("state", String, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("ended_at", Double),
    Column("outcome", String, nullable=False),
    Column("error", AnyText, nullable=False),
    *_amounts("confirmed_"),
    *_amounts("unconfirmed_"),
    Column("resumed", Integer, nullable=False),
    Column("continues", String),
    Column("keeps_namespace", Boolean, nullable=False),
    Column("home", String, nullable=False),
    Column("last_position", BigInteger, nullable=False),
    Column("wish", String, nullable=False, server_default=text("''")),
    Column("epoch", BigInteger, nullable=False, server_default=text("0")),
    UniqueConstraint("tenant_id", "idempotency_key"),
    Index(None, "tenant_id", "created_at", "run_id"),
    Index(None, "tenant_id", "state"),
    Index(None, "home", "state"),
)
"""One row a root run, written with every append to its tree: what is long stands in `run_texts`.

`epoch` is that of its home under which its tree may be written, 0 until anybody did. Who was declared away
since has an older one, and can't.
"""
Index(
    "ix_runs_wish",
    runs.c.home,
    sqlite_where=runs.c.wish != text("''"),
    postgresql_where=runs.c.wish != text("''"),
)
"""What a home has to do: empty, but for a moment."""

run_texts = Table(
    "run_texts",
    metadata,
    Column("run_id", ForeignKey("runs.run_id", ondelete="CASCADE"), primary_key=True),
    Column("question", AnyText, nullable=False),
    Column("answer", LargeBinary),
)

events = Table(
    "events",
    metadata,
    Column("root_run_id", ForeignKey("runs.run_id", ondelete="CASCADE"), primary_key=True),
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("run_id", String, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("event", Text, nullable=False),
    UniqueConstraint("root_run_id", "run_id", "seq"),
)
"""`Event.to_json`, in ASCII."""

blobs = Table(
    "blobs",
    metadata,
    Column("root_run_id", ForeignKey("runs.run_id", ondelete="CASCADE"), primary_key=True),
    Column("sha256", String, primary_key=True),
    Column("data", LargeBinary, nullable=False),
)
"""Long texts, each tree's its own: two trees of one tenant that read the same text keep it twice, so that
the end of one is nobody else's business, and no count can be wrong."""

ledger = Table(
    "ledger",
    metadata,
    Column("entry_id", _Number, primary_key=True),
    Column("at", Double, nullable=False),
    Column("tenant_id", String, nullable=False),
    Column("root_run_id", String, nullable=False, index=True),
    Column("run_id", String, nullable=False),
    Column("call", String, nullable=False),
    Column("attempt", Integer, nullable=False),
    *_amounts("confirmed_"),
    *_amounts("unconfirmed_"),
    Index(None, "tenant_id", "at"),
)
"""What invoices are made of. It refers to nothing, because it outlives everything."""

usage = Table(
    "usage",
    metadata,
    Column("tenant_id", String, primary_key=True),
    Column("time_window", String, primary_key=True),
    *_amounts(),
    Column("runs", BigInteger, nullable=False, server_default=text("0")),
)

draws = Table(
    "draws",
    metadata,
    Column("draw_id", _Number, primary_key=True),
    Column("tenant_id", String, nullable=False),
    Column("root_run_id", String, nullable=False, index=True),
    Column("time_windows", JsonText, nullable=False),
    *_amounts(),
)
"""What run trees have drawn and not given back, and the windows that it counts in."""

audit = Table(
    "audit",
    metadata,
    Column("number", _Number, primary_key=True),
    Column("at", Double, nullable=False),
    Column("tenant_id", String, index=True),
    Column("actor", AnyText, nullable=False),
    Column("action", AnyText, nullable=False),
    Column("target", AnyText, nullable=False),
    Column("detail", AnyText, nullable=False),
)
