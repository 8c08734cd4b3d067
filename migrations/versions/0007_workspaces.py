"""Workspaces: what there is belongs to the one that is there from the start. Audit log, and predictions by day.

Revision: 0007
Follows: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

FIRST = "ws_default"
# Rebuilding a table would forget that SQLite shall never give a seq twice.
SEQ = {"sqlite_autoincrement": True}
BIG_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    workspaces = op.create_table(
        "workspaces",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("max_bytes", sa.BigInteger(), nullable=True),
        sa.Column("max_unfinished_jobs", sa.Integer(), nullable=True),
        sa.Column("max_predictions_per_day", sa.BigInteger(), nullable=True),
        sa.Column("requests_per_second", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workspaces")),
        sa.UniqueConstraint("name", name=op.f("uq_workspaces_name")),
    )
    op.execute(workspaces.insert().values(id=FIRST, name="default", created_at=sa.func.now()))
    for table in ("datasets", "jobs", "models", "predictions"):
        _give_to_first(table, table_kwargs=SEQ)
    _give_to_first("api_keys")
    _give_to_first("aliases", is_key=True)
    op.create_table(
        "audit_log",
        sa.Column("seq", BIG_KEY, autoincrement=True, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.Column("changed", sa.JSON(), nullable=False),
        sa.Column("workspace_id", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], name=op.f("fk_audit_log_workspace_id_workspaces")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit_log")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_audit_log_at"), "audit_log", ["at"])
    op.create_index(op.f("ix_audit_log_workspace_id"), "audit_log", ["workspace_id"])
    op.create_table(
        "usage",
        sa.Column("workspace_id", sa.String(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("predictions", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], name=op.f("fk_usage_workspace_id_workspaces")),
        sa.PrimaryKeyConstraint("workspace_id", "day", name=op.f("pk_usage")),
    )


def _give_to_first(table_name: str, *, is_key: bool = False, table_kwargs: dict[str, bool] | None = None) -> None:
    """Adds workspace_id to a table; as a part of its key, names are unique within a workspace only."""
    column = sa.Column("workspace_id", sa.String(), nullable=False, server_default=FIRST)
    with op.batch_alter_table(table_name, table_kwargs=table_kwargs or {}) as table:
        table.add_column(column)
    with op.batch_alter_table(table_name, table_kwargs=table_kwargs or {}) as table:
        # From now on whoever adds a row has to say whose it is.
        table.alter_column("workspace_id", server_default=None)
        table.create_foreign_key(
            op.f(f"fk_{table_name}_workspace_id_workspaces"), "workspaces", ["workspace_id"], ["id"]
        )
        if is_key:
            table.drop_constraint(op.f(f"pk_{table_name}"), type_="primary")
            table.create_primary_key(op.f(f"pk_{table_name}"), ["workspace_id", "name"])
        else:
            table.create_index(op.f(f"ix_{table_name}_workspace_id"), ["workspace_id"])
