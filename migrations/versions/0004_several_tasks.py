"""Data sets and models that tell several things of each picture.

Revision: 0004
Follows: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("datasets", "models"):
        op.add_column(table, sa.Column("tasks", sa.JSON(), nullable=False, server_default="[]"))
