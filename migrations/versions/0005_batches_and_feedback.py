"""Batches, which are jobs of a further kind; predictions that are kept, and data sets made of what is said of them.

Revision: 0005
Follows: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# Rebuilding a table would forget that SQLite shall never give a seq twice.
SEQ = {"sqlite_autoincrement": True}
BIG_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    with op.batch_alter_table("jobs", table_kwargs=SEQ) as table:
        table.drop_constraint(op.f("ck_jobs_kind"), type_="check")
        table.create_check_constraint(op.f("ck_jobs_kind"), "kind IN ('training', 'ingest', 'prediction')")
    op.add_column("datasets", sa.Column("parent_id", sa.String(), nullable=True))
    op.create_table(
        "predictions",
        sa.Column("seq", BIG_KEY, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("dataset_id", sa.String(), nullable=False),
        sa.Column("alias", sa.String(), nullable=True),
        sa.Column("filename", sa.String(), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("predicted", sa.JSON(), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.Column("feedback", sa.JSON(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("feedback_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_predictions")),
        sa.UniqueConstraint("id", name=op.f("uq_predictions_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_predictions_model_id_seq", "predictions", ["model_id", "seq"])
    op.create_index("ix_predictions_seq_size_bytes", "predictions", ["seq", "size_bytes"])
    op.create_index(op.f("ix_predictions_dataset_id"), "predictions", ["dataset_id"])
    op.create_index(op.f("ix_predictions_created_at"), "predictions", ["created_at"])
