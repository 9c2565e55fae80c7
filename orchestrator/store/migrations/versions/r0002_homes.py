"""Servers say that they are there, and are told by the database what other servers were asked.

Made from `tables.py` of its day, and never changed again: what comes later is a step of its own.
"""

import sqlalchemy as sa
from alembic import op

revision = "r0002"
down_revision = "r0001"


def upgrade() -> None:
    """Make what is new. Runs that are there have no wish, and nobody's epoch."""
    op.create_table(
        "homes",
        sa.Column("home", sa.String(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("heard_until", sa.Double(), nullable=False),
        sa.Column("settler", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("home", name="pk_homes"),
    )
    op.create_table(
        "doomed_contexts",
        sa.Column("context_id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("name", sa.LargeBinary(), nullable=False),
        sa.Column("home", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("context_id", name="pk_doomed_contexts"),
    )
    op.create_index("ix_doomed_contexts_home", "doomed_contexts", ["home"], unique=False)
    op.add_column("runs", sa.Column("wish", sa.String(), server_default=sa.text("''"), nullable=False))
    op.add_column("runs", sa.Column("epoch", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.create_index(
        "ix_runs_wish",
        "runs",
        ["home"],
        unique=False,
        sqlite_where=sa.text("wish != ''"),
        postgresql_where=sa.text("wish != ''"),
    )
