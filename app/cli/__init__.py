"""The `graft` command: the server's own commands, and a client for people.

    server.py     up, api, worker, migrate, backup, restore, settings
    tenants.py    keys, workspaces
    train.py      train, from the upload on
    watching.py   how a job is watched
    predict.py    predict, feedback
    resources.py  jobs, datasets, models
    batches.py    batches
    demo.py       demo
    weights.py    weights import
    completion.py what the shell offers behind TAB
    terminal.py   what all of them print with, and how they fail

Nothing here imports torch or FastAPI: the API and the worker run as programs of their own, so that the command is
quick to start.
"""

from app.cli.root import main

__all__ = ["main"]
