"""The `graft` command: the server's own commands, and a client for people.

    server.py     up, api, worker, migrate, settings, keys
    train.py      train, and how a job is watched
    resources.py  predict, jobs, datasets, models
    demo.py       demo
    weights.py    weights import
    terminal.py   what all of them print with, and how they fail

Nothing here imports torch or FastAPI: the API and the worker run as programs of their own, so that the command is
quick to start.
"""

from app.cli.root import main

__all__ = ["main"]
