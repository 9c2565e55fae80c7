"""How many sandboxes of a tenant each server may have."""

import sqlalchemy as sa
from alembic import op

revision = "r0004"
down_revision = "r0003"


def upgrade() -> None:
    """Make their table. Nobody has claimed anything."""
    op.create_table(
        "rooms",
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("home", sa.String(), nullable=False),
        sa.Column("units", sa.BigInteger(), nullable=False),
        sa.Column("chains", sa.BigInteger(), nullable=False),
        sa.Column("wants", sa.BigInteger(), nullable=False),
        sa.Column("turn", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenants.tenant_id"], name="fk_rooms_tenant_id_tenants", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("tenant_id", "home", name="pk_rooms"),
    )
    op.create_index("ix_rooms_home", "rooms", ["home"], unique=False)
