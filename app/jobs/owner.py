"""Which process owns a piece of work, and whether that process is certainly gone.

A pid alone says nothing: it is reused, means something else in another container, and starts anew at each boot. So an
owner is host, boot, pid namespace, pid and start time together. Knows processes; not jobs, not the database.
"""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil

_ZOMBIE_OR_DEAD = frozenset("ZXx")


def current_process() -> dict[str, Any]:
    """This process as `owner` columns keep it: {"host", "boot_id", "pid_namespace", "pid", "started"}."""
    return owner_of(os.getpid())


def owner_of(pid: int) -> dict[str, Any]:
    """The same for another living process of this host. Raises ProcessLookupError if there is none."""
    started = _start_time(pid)
    if started is None:
        raise ProcessLookupError(pid)
    return {**_here(), "pid": pid, "started": started}


def is_gone(owner: dict[str, Any] | None) -> bool:
    """Whether the owner has certainly ended. False if it lives, and also if that cannot be told from here."""
    return _lives(owner) is False


def is_alive(owner: dict[str, Any] | None) -> bool:
    """Whether the owner certainly lives. False if it has ended, and also if that cannot be told from here."""
    return _lives(owner) is True


def _lives(owner: dict[str, Any] | None) -> bool | None:
    """None if that cannot be told from here."""
    if owner is None or any(owner.get(key) != value for key, value in _here().items()):
        return None
    pid = owner["pid"]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return None  # another user's process: it exists, and its start time may be hidden
    return bool(_start_time(pid) == owner["started"])


def _here() -> dict[str, Any]:
    """What must be equal for a pid to mean the same process."""
    return {"host": platform.node(), "boot_id": _boot_id(), "pid_namespace": _pid_namespace()}


def _boot_id() -> str:
    if sys.platform == "linux":
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return str(int(psutil.boot_time()))


def _pid_namespace() -> str:
    """Containers that share a host name, as with host networking, still count their pids apart."""
    if sys.platform == "linux":
        return os.readlink("/proc/self/ns/pid")
    return ""


def _start_time(pid: int) -> float | None:
    """When the process started, in a unit that a change of the clock does not change; None if it does not run.

    psutil's create_time moves with the clock on Linux (it adds the time of boot), so the kernel's own count of clock
    ticks since boot is read there. A zombie has ended: only its parent has not asked yet.
    """
    if sys.platform != "linux":
        try:
            return psutil.Process(pid).create_time()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in brackets, which may itself hold spaces and brackets.
    fields = stat.rpartition(")")[2].split()
    state, ticks_since_boot = fields[0], int(fields[19])
    return None if state in _ZOMBIE_OR_DEAD else ticks_since_boot
