"""A process that waits for a line, claims jobs until none is left, and prints what it got. Argument: database URL."""

import sys

from app.db.engine import Database
from app.jobs import owner, queue
from app.jobs.states import JobKind


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(url: str) -> None:
    database = Database(url)
    say("ready")
    sys.stdin.readline()
    while True:
        with database.write() as session:
            claim = queue.claim_next(session, kind=JobKind.training, worker_id="racer", owner=owner.current_process())
        if claim is None:
            break
        say(f"{claim.job_id}/{claim.fence}")
    database.dispose()


if __name__ == "__main__":
    main(*sys.argv[1:])
