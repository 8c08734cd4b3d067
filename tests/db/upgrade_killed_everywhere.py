"""Upgrades copies of a database, each in a process that kills itself one statement later than the one before it.

Arguments: the SQLite file, and a folder for the copies, which get the number of the statement. Says at what each was
killed: before that statement, before the commit, or when all was done. After one statement is before the next; those
that only look are left out.
"""

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from app.db.migrate import upgrade


def upgrade_and_die(path: Path, *, at: int) -> None:
    passed = itertools.count(1)

    def reach(name: str) -> None:
        if next(passed) == at:
            os.write(sys.stdout.fileno(), " ".join(name.split()).encode() + b"\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def before_statement(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        if statement.split()[0] not in ("PRAGMA", "SELECT"):
            reach(statement)

    event.listen(Engine, "before_cursor_execute", before_statement)
    event.listen(Engine, "commit", lambda _connection: reach("COMMIT"))
    upgrade(f"sqlite:///{path}")
    reach("done")


def main() -> None:
    old, folder = Path(sys.argv[1]), Path(sys.argv[2])
    for at in itertools.count(1):
        copy = folder / f"{at:04}.db"
        shutil.copy(old, copy)
        child = os.fork()
        if child == 0:
            upgrade_and_die(copy, at=at)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if os.waitstatus_to_exitcode(status) == 0:
            copy.unlink()  # nothing was left to be killed at
            return
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


if __name__ == "__main__":
    main()
