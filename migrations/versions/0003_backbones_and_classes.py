"""What pretraining and few-shot models keep: data sets and epochs without labels, models made from others.

Revision: 0003
Follows: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Rebuilding a table would forget that SQLite shall never give a seq twice.
SEQ = {"sqlite_autoincrement": True}
ONE_PER_JOB = sa.text("role <> 'extended'")


def upgrade() -> None:
    with op.batch_alter_table("datasets", table_kwargs=SEQ) as table:
        table.add_column(sa.Column("kind", sa.String(), nullable=False, server_default="labelled"))
    with op.batch_alter_table("epochs") as table:
        table.alter_column("train_accuracy", existing_type=sa.Float(), nullable=True)
        table.alter_column("val_accuracy", existing_type=sa.Float(), nullable=True)
        table.add_column(sa.Column("figures", sa.JSON(), nullable=True))
    with op.batch_alter_table("models", table_kwargs=SEQ) as table:
        table.add_column(sa.Column("parent_id", sa.String(), nullable=True))
        table.drop_constraint(op.f("uq_models_job_id_role"), type_="unique")
    op.create_index(
        "uq_models_job_id_role",
        "models",
        ["job_id", "role"],
        unique=True,
        sqlite_where=ONE_PER_JOB,
        postgresql_where=ONE_PER_JOB,
    )
