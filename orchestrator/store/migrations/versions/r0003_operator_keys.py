"""Keys of the installation, which are no tenant's."""

import sqlalchemy as sa
from alembic import op

revision = "r0003"
down_revision = "r0002"


def upgrade() -> None:
    """Make their table."""
    op.create_table(
        "operator_keys",
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("key_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("hint", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("key_id", name="pk_operator_keys"),
        sa.UniqueConstraint("key_sha256", name="uq_operator_keys_key_sha256"),
    )
