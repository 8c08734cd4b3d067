"""Batches, which are jobs of a further kind.

Revision: 0005
Follows: 0004
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# Rebuilding a table would forget that SQLite shall never give a seq twice.
SEQ = {"sqlite_autoincrement": True}


def upgrade() -> None:
    with op.batch_alter_table("jobs", table_kwargs=SEQ) as table:
        table.drop_constraint(op.f("ck_jobs_kind"), type_="check")
        table.create_check_constraint(op.f("ck_jobs_kind"), "kind IN ('training', 'ingest', 'prediction')")
