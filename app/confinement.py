"""Limits that a process sets itself before it looks at something from strangers. Knows the operating system alone.

A limit of address space is the one that Linux keeps: beyond it an allocation fails, whoever makes it, and the process
goes on or ends; nothing else on the machine is touched. Where there is no such limit (macOS), none is set.
"""

import resource
import sys
from pathlib import Path

PAGE_BYTES = resource.getpagesize()


def confine(*, more_bytes: int, cpu_seconds: int | None = None) -> None:
    """From now on this process may take `more_bytes` beyond what it has mapped, and so many seconds of processors.

    Call it with everything imported: a library that is loaded later counts. What is beyond raises MemoryError or what
    else a library makes of it; the last second of the processors ends the process by SIGXCPU. No core is dumped.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if cpu_seconds is not None:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + cpu_seconds, int(used) + cpu_seconds))
    if sys.platform == "linux":
        mapped_bytes = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * PAGE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + more_bytes, mapped_bytes + more_bytes))
