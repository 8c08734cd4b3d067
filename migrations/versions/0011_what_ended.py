"""Jobs are found by when they ended, to be swept.

Revision: 0011
Follows: 0010
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_jobs_finished_at"), "jobs", ["finished_at"])
