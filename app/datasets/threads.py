"""Files of an archive through a function that takes long, such as decoding: in threads, in order, in bounded memory."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from app.datasets import archive as archives
from app.datasets.archive import ArchiveLimits
from app.vision.device import usable_cores

# Files that wait for a thread or are in one; with it memory is bounded whatever the archive's size.
_MAX_BYTES_IN_FLIGHT = 64 * 1024**2

T = TypeVar("T")


def each_file(
    archive: Path,
    work: Callable[[str, bytes], T],
    *,
    is_wanted: Callable[[str], bool],
    limits: ArchiveLimits,
    tick: Callable[[float], None],
    start: int = 0,
) -> Generator[T, None, None]:
    """What `work` makes of each file's path and bytes, in the order of the archive.

    work: runs in threads, one per core; Pillow and torch let go of the GIL. is_wanted: by path; files that are not are
    passed over. tick: called for each file with the share of the archive read; may raise to stop. start: wanted files
    that are passed over too, because they are done.
    Raises what `archive.stream` and `work` do.
    """
    size_bytes = max(archive.stat().st_size, 1)
    threads = usable_cores()
    waiting: deque[tuple[Future[T], int]] = deque()
    bytes_in_flight = wanted = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for member, content in archives.iterate(archive, limits=limits):
                tick(min(member.position / size_bytes, 1.0))
                wanted += is_wanted(member.path)
                if not is_wanted(member.path) or wanted <= start:
                    continue
                waiting.append((pool.submit(work, member.path, content), len(content)))
                bytes_in_flight += len(content)
                while len(waiting) > 4 * threads or bytes_in_flight > _MAX_BYTES_IN_FLIGHT:
                    first, first_bytes = waiting.popleft()
                    bytes_in_flight -= first_bytes
                    yield first.result()
            while waiting:
                tick(1.0)
                yield waiting.popleft()[0].result()
        finally:
            pool.shutdown(cancel_futures=True)
