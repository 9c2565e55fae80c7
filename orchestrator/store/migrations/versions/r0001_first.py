"""The first tables; audit, ledger and events only ever grow.

Made from `tables.py` of its day, and never changed again: what comes later is a step of its own.
"""

import sqlalchemy as sa
from alembic import op

revision = "r0001"
down_revision = None

# Of a deleted run the events go. What they were is never changed; the other two outlive everything.
_FORBIDDEN = [
    ("audit", "UPDATE"),
    ("audit", "DELETE"),
    ("ledger", "UPDATE"),
    ("ledger", "DELETE"),
    ("events", "UPDATE"),
    ("blobs", "UPDATE"),
]


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "audit",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=True),
        sa.Column("actor", sa.LargeBinary(), nullable=False),
        sa.Column("action", sa.LargeBinary(), nullable=False),
        sa.Column("target", sa.LargeBinary(), nullable=False),
        sa.Column("detail", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_audit"),
    )
    op.create_index("ix_audit_tenant_id", "audit", ["tenant_id"], unique=False)
    op.create_table(
        "draws",
        sa.Column("draw_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("root_run_id", sa.String(), nullable=False),
        sa.Column("time_windows", sa.Text(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("cost_microusd", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("calls", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("child_runs", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("draw_id", name="pk_draws"),
    )
    op.create_index("ix_draws_root_run_id", "draws", ["root_run_id"], unique=False)
    op.create_table(
        "ledger",
        sa.Column("entry_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("root_run_id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("call", sa.String(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("confirmed_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("confirmed_cost_microusd", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("confirmed_calls", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("confirmed_child_runs", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("unconfirmed_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("unconfirmed_cost_microusd", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("unconfirmed_calls", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("unconfirmed_child_runs", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("entry_id", name="pk_ledger"),
    )
    op.create_index("ix_ledger_root_run_id", "ledger", ["root_run_id"], unique=False)
    op.create_index("ix_ledger_tenant_id_at", "ledger", ["tenant_id", "at"], unique=False)
    op.create_table(
        "tenants",
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("name", sa.LargeBinary(), nullable=False),
        sa.Column("rules", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("removed_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("tenant_id", name="pk_tenants"),
    )
    op.create_index(
        "uq_tenants_name",
        "tenants",
        ["name"],
        unique=True,
        sqlite_where=sa.text("removed_at IS NULL"),
        postgresql_where=sa.text("removed_at IS NULL"),
    )
    op.create_table(
        "usage",
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("time_window", sa.String(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("cost_microusd", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("calls", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("child_runs", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("runs", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "time_window", name="pk_usage"),
    )
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("key_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("hint", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name="fk_api_keys_tenant_id"),
        sa.PrimaryKeyConstraint("key_id", name="pk_api_keys"),
        sa.UniqueConstraint("key_sha256", name="uq_api_keys_key_sha256"),
    )
    op.create_index("ix_api_keys_tenant_id", "api_keys", ["tenant_id"], unique=False)
    op.create_table(
        "contexts",
        sa.Column("context_id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("name", sa.LargeBinary(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("length_bytes", sa.BigInteger(), nullable=False),
        sa.Column("home", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("is_complete", sa.Boolean(), nullable=False),
        sa.Column("is_inline", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name="fk_contexts_tenant_id"),
        sa.PrimaryKeyConstraint("context_id", name="pk_contexts"),
        sa.UniqueConstraint(
            "tenant_id",
            "sha256",
            "length_bytes",
            "name",
            "home",
            name="uq_contexts_tenant_id_sha256_length_bytes_name_home",
        ),
    )
    op.create_index("ix_contexts_home", "contexts", ["home"], unique=False)
    op.create_index(
        "ix_contexts_tenant_id_created_at_context_id",
        "contexts",
        ["tenant_id", "created_at", "context_id"],
        unique=False,
    )
    op.create_table(
        "runs",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("idempotency_key", sa.LargeBinary(), nullable=False),
        sa.Column("request_hash", sa.String(), nullable=False),
        sa.Column("context_id", sa.String(), nullable=False),
        sa.Column("options", sa.Text(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("error", sa.LargeBinary(), nullable=False),
        sa.Column("confirmed_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("confirmed_cost_microusd", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("confirmed_calls", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("confirmed_child_runs", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("unconfirmed_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("unconfirmed_cost_microusd", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("unconfirmed_calls", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("unconfirmed_child_runs", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("resumed", sa.Integer(), nullable=False),
        sa.Column("continues", sa.String(), nullable=True),
        sa.Column("keeps_namespace", sa.Boolean(), nullable=False),
        sa.Column("home", sa.String(), nullable=False),
        sa.Column("last_position", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name="fk_runs_tenant_id"),
        sa.PrimaryKeyConstraint("run_id", name="pk_runs"),
        sa.UniqueConstraint("tenant_id", "idempotency_key", name="uq_runs_tenant_id_idempotency_key"),
    )
    op.create_index("ix_runs_context_id", "runs", ["context_id"], unique=False)
    op.create_index("ix_runs_home_state", "runs", ["home", "state"], unique=False)
    op.create_index(
        "ix_runs_tenant_id_created_at_run_id", "runs", ["tenant_id", "created_at", "run_id"], unique=False
    )
    op.create_index("ix_runs_tenant_id_state", "runs", ["tenant_id", "state"], unique=False)
    op.create_table(
        "blobs",
        sa.Column("root_run_id", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["root_run_id"], ["runs.run_id"], name="fk_blobs_root_run_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("root_run_id", "sha256", name="pk_blobs"),
    )
    op.create_table(
        "events",
        sa.Column("root_run_id", sa.String(), nullable=False),
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["root_run_id"], ["runs.run_id"], name="fk_events_root_run_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("root_run_id", "position", name="pk_events"),
        sa.UniqueConstraint("root_run_id", "run_id", "seq", name="uq_events_root_run_id_run_id_seq"),
    )
    op.create_table(
        "run_texts",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("question", sa.LargeBinary(), nullable=False),
        sa.Column("answer", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_run_texts_run_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", name="pk_run_texts"),
    )

    if op.get_bind().dialect.name == "sqlite":
        for table, what in _FORBIDDEN:
            op.execute(
                f"CREATE TRIGGER {table}_no_{what.lower()} BEFORE {what} ON {table}"
                f" BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
    else:
        op.execute(
            "CREATE FUNCTION append_only() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$"
        )
        for table, what in _FORBIDDEN:
            op.execute(
                f"CREATE TRIGGER {table}_no_{what.lower()} BEFORE {what} ON {table}"
                " FOR EACH ROW EXECUTE FUNCTION append_only()"
            )
