"""Runs the migrations on the connection that `app/db/migrate.py` hands over; there is no other way in.

Forward only: a database made by a newer version is refused, and the way back is a backup. A new migration is written by
hand, numbered; `tests/db/test_migrations.py` says what it lacks, `tests/db/old_databases.py` keeps a database of it.
Tables are altered with `op.batch_alter_table`, which on SQLite rebuilds them.
"""

from alembic import context

from app.db.migrate import CONNECTION_ATTRIBUTE

context.configure(connection=context.config.attributes[CONNECTION_ATTRIBUTE])
with context.begin_transaction():
    context.run_migrations()
