"""Models that were personalised, of whose job there may be several, as of those that were extended.

Revision: 0006
Follows: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

ONE_PER_JOB = sa.text("role IN ('probe', 'final')")


def upgrade() -> None:
    op.drop_index("uq_models_job_id_role", table_name="models")
    op.create_index(
        "uq_models_job_id_role",
        "models",
        ["job_id", "role"],
        unique=True,
        sqlite_where=ONE_PER_JOB,
        postgresql_where=ONE_PER_JOB,
    )
