"""A real worker process whose children tell stories. Arguments: its settings as JSON, and a command for
its children if they are to be others."""

import json
import sys
from pathlib import Path

from app.settings import Settings
from worker.main import run_worker

STORIES = (sys.executable, str(Path(__file__).with_name("stories.py")))

if __name__ == "__main__":
    settings, *child_command = sys.argv[1:]
    run_worker(Settings(**json.loads(settings)), child_command=child_command or STORIES)
