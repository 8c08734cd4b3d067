"""Workspaces take turns in the queue.

Revision: 0012
Follows: 0011
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "turns",
        sa.Column("workspace_id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], name=op.f("fk_turns_workspace_id_workspaces")),
        sa.PrimaryKeyConstraint("workspace_id", "kind", name=op.f("pk_turns")),
    )
    op.drop_index("ix_jobs_kind_status_seq", "jobs")
    op.create_index("ix_jobs_kind_status_workspace_id_seq", "jobs", ["kind", "status", "workspace_id", "seq"])
