"""A command in a terminal of its own, as somebody who looks on has it."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

COLUMNS, ROWS = 110, 40
WITHIN_SECONDS = 60.0

# What a terminal is told besides text: colours, movements of the cursor, what is cleared.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|38;)[0-9;]*m")
# So that Ctrl-C reaches what is then run in this process's place.
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class TerminalSession:
    """`graft` with these arguments; `raw` is all that it has written."""

    def __init__(self, *arguments: str, environment: dict[str, str], folder: Path) -> None:
        self._terminal, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, sys.executable, "-m", "app.cli", *arguments],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        os.close(inside)
        self.raw = ""

    @property
    def text(self) -> str:
        """Without what moves and colours it: every state that a line has had, one after the other."""
        return CONTROL.sub("", self.raw)

    @property
    def is_coloured(self) -> bool:
        return COLOUR.search(self.raw) is not None

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + WITHIN_SECONDS
        while text not in self.text:
            assert time.monotonic() < deadline, f"{text!r} is not in\n{self.text}"
            assert self._read(), f"{text!r} is not in\n{self.text}"

    def press_ctrl_c(self) -> None:
        os.write(self._terminal, b"\x03")

    def end(self) -> int:
        """Its exit code, once it has ended."""
        deadline = time.monotonic() + WITHIN_SECONDS
        while self._read():
            assert time.monotonic() < deadline, f"it goes on:\n{self.text}"
        return self.process.wait(WITHIN_SECONDS)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._terminal)

    def _read(self) -> bool:
        """Takes what is there; False at the end."""
        ready, _, _ = select.select([self._terminal], [], [], 0.2)
        if not ready:
            return True
        try:
            written = os.read(self._terminal, 65536)
        except OSError:  # Linux's way to say that nobody has the terminal any more
            return False
        self.raw += written.decode(errors="replace")
        return bool(written)
