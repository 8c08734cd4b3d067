"""What method auto, the promotion gate and the stated size of the pixel store keep.

Revision: 0002
Follows: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Rebuilding a table would forget that SQLite shall never give a seq twice.
SEQ = {"sqlite_autoincrement": True}


def upgrade() -> None:
    with op.batch_alter_table("datasets", table_kwargs=SEQ) as table:
        table.add_column(sa.Column("packed_bytes", sa.BigInteger(), nullable=True))
    with op.batch_alter_table("epochs") as table:
        table.add_column(sa.Column("method", sa.String(), nullable=True))
    with op.batch_alter_table("aliases") as table:
        table.add_column(sa.Column("previous_model_id", sa.String(), nullable=True))
    with op.batch_alter_table("models", table_kwargs=SEQ) as table:
        table.add_column(sa.Column("role", sa.String(), nullable=False, server_default="final"))
        table.add_column(sa.Column("promotion", sa.JSON(), nullable=True))
        table.drop_constraint(op.f("uq_models_job_id"), type_="unique")
        table.create_unique_constraint(op.f("uq_models_job_id_role"), ["job_id", "role"])
