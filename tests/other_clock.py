"""Another wall clock than the machine's for real processes, by libfaketime. Their monotonic time is the machine's."""

from collections.abc import Mapping
from pathlib import Path

LIBRARIES = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), *Path("/usr/lib/faketime").glob("libfaketime.so.1")]


class Clock:
    """The wall clock of processes that are started with its environment."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.set("+0")

    def set(self, offset: str) -> None:
        """offset: to the machine's clock, such as +2d or -3600."""
        part = self._path.with_suffix(".part")
        part.write_text(f"{offset}\n")
        part.replace(self._path)

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            "LD_PRELOAD": str(LIBRARIES[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",  # the dates of files stay, as they do when a clock is set
        }
