"""Where bytes lie. The only file that knows: everyone else has keys such as "models/mdl_…".

What is published appears whole or not at all, and survives a power cut: it is written in staging, synced, renamed, and
the folders are synced. A failed sync is an error, never a warning. What is left in staging by a crash is swept.

Files come before the database row that speaks of them, and a crash may come between. So such a key is announced first,
until it is known whether the row is there. Only announced keys are ever swept: a server that was pointed at another
database by mistake deletes nothing.

Whoever stages or announces something holds a lock on a file beside it, which the kernel frees with the process: so a
sweep knows what is still being worked on, in other containers too, whatever any clock says.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import StorageFull

# Of what nobody holds in staging: it was being deleted, or an earlier version, which held nothing, may be at it.
STAGING_MAX_AGE_SECONDS = 24 * 3600
# A database server may still be committing what a process that has just died asked it to.
ANNOUNCEMENT_MAX_AGE_SECONDS = 3600
_HELD = ".held"
# A folder cannot be renamed over a full one, nor a file over a folder.
_IS_FOLDER = (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR)


class LocalStorage:
    """Storage in one folder of the local file system."""

    def __init__(self, root: Path, *, min_free_bytes: int = 0) -> None:
        """min_free_bytes: new data is refused when less would remain free."""
        self.root = root
        self._staging = root / "staging"
        self._announced = root / "announced"
        for folder in (self._staging, self._announced):
            make_folder(folder)
        self._min_free_bytes = min_free_bytes

    @contextmanager
    def staging(self, suffix: str = "") -> Iterator[Path]:
        """A fresh path that does not exist yet, for a file or folder; whatever is left there at the end is removed."""
        path = self._staging / f"{uuid.uuid4().hex}{suffix}"
        lock = _lock_of(path)
        with _held(lock):
            try:
                yield path
            finally:
                remove(path)
                lock.unlink(missing_ok=True)

    def publish(self, staged: Path, key: str) -> None:
        """Moves a staged file or folder to `key`, durably, replacing what was there before.

        Raises OSError if a sync or the rename fails; nothing is then visible under `key` that was not before.
        """
        target = self.path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        sync_tree(staged)
        while True:
            try:
                staged.replace(target)
                break
            except OSError as error:
                if error.errno not in _IS_FOLDER:
                    raise
            # Only the same work publishes twice: a retry of it, or two who are at it at the same time.
            with self.staging() as aside, contextlib.suppress(FileNotFoundError):
                target.rename(aside)
        for folder in (target.parent, *target.parent.parents):
            sync(folder)
            if folder == self.root:
                break

    def link(self, key: str, staged: Path) -> None:
        """A second name for a file, in staging: to be published, while the first stays whatever happens meanwhile.

        Raises OSError where even a copy cannot be made.
        """
        try:
            staged.hardlink_to(self.path(key))
        except OSError:  # a file system without such names
            shutil.copyfile(self.path(key), staged)

    @contextmanager
    def announced(self, *keys: str, is_wanted: Callable[[str], bool]) -> Iterator[None]:
        """Notes that `keys` are about to be published, and are worth nothing until a row speaks of them.

        is_wanted: whether one speaks of a key, asked at the end whatever happened: of the database, and not concluded
        from an exception, since a commit may succeed and its answer get lost. If none does, the key is deleted. If
        that cannot be told, or the process dies, a sweep comes to it.
        """
        announcement = self._announced / f"{uuid.uuid4().hex}.json"
        with _held(announcement) as descriptor:
            try:
                os.write(descriptor, json.dumps(keys).encode())
                os.fsync(descriptor)
                sync(self._announced)
                yield
            finally:
                self._settle(announcement, keys, is_wanted)

    def announced_keys(self) -> set[str]:
        """Keys that no row may speak of yet, whether their process lives or not."""
        found: set[str] = set()
        for announcement in self._announced.iterdir():
            with contextlib.suppress(FileNotFoundError):  # settled meanwhile
                found.update(_announced_keys(announcement))
        return found

    def sweep_announced(
        self, is_wanted: Callable[[str], bool], *, older_than_seconds: float = ANNOUNCEMENT_MAX_AGE_SECONDS
    ) -> None:
        """Ends announcements whose process has died. is_wanted: whether a row speaks of a key."""
        deadline = time.time() - older_than_seconds
        for announcement in sorted(self._announced.iterdir()):
            with contextlib.suppress(FileNotFoundError, BlockingIOError):  # settled meanwhile, or being worked on
                if announcement.stat().st_mtime < deadline:
                    with _held(announcement, is_new=False):
                        self._settle(announcement, _announced_keys(announcement), is_wanted)

    def _settle(self, announcement: Path, keys: Iterable[str], is_wanted: Callable[[str], bool]) -> None:
        for key in keys:
            if not is_wanted(key):
                self.delete(key)
        announcement.unlink()

    def path(self, key: str) -> Path:
        """The local path of a key. Keys are made of our own ids, never of a caller's text."""
        path = (self.root / key).resolve()
        assert path.is_relative_to(self.root.resolve()), key
        return path

    def files(self, key: str) -> list[str]:
        """Keys of the files at or below a key. Raises FileNotFoundError if it goes meanwhile."""
        root = self.path(key)
        if root.is_file():
            return [key]
        return sorted(f"{key}/{path.relative_to(root).as_posix()}" for path in root.rglob("*") if path.is_file())

    def exists(self, key: str) -> bool:
        return self.path(key).exists()

    def delete(self, key: str) -> None:
        """Removes a key, and what lies below it; open files and memory maps of it stay readable."""
        path = self.path(key)
        if path.exists():
            # Renamed first, so that nobody sees it half deleted. Held by nobody: a full disk may have no room for that.
            doomed = self._staging / uuid.uuid4().hex
            with contextlib.suppress(FileNotFoundError):
                path.rename(doomed)
                remove(doomed)

    def check_room(self, incoming_bytes: int = 0) -> None:
        """Raises StorageFull if storing this many bytes would leave less than the reserve free."""
        if self.spare_bytes() < incoming_bytes:
            raise StorageFull(
                "The server's disk is too full for this; delete data sets or models, or ask its operator."
            )

    def spare_bytes(self) -> int:
        """What is free beyond the reserve; negative when it is less."""
        return shutil.disk_usage(self.root).free - self._min_free_bytes

    def sweep(self, *, older_than_seconds: float = STAGING_MAX_AGE_SECONDS) -> int:
        """Removes what crashes have left in staging. Returns how many entries were removed.

        older_than_seconds: of entries without a lock; what a dead process held goes whatever its age.
        """
        removed = 0
        for lock in self._staging.glob(f"*{_HELD}"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError):  # ended meanwhile, or being worked on
                with _held(lock, is_new=False):
                    remove(lock.with_name(lock.name.removesuffix(_HELD)))
                    lock.unlink()
                removed += 1
        deadline = time.time() - older_than_seconds
        for path in self._staging.iterdir():
            with contextlib.suppress(FileNotFoundError):
                is_held = path.suffix == _HELD or _lock_of(path).exists()
                if not is_held and path.lstat().st_mtime < deadline:
                    remove(path)
                    removed += 1
        return removed


def _lock_of(staged: Path) -> Path:
    return staged.with_name(f"{staged.name}{_HELD}")


@contextmanager
def _held(path: Path, *, is_new: bool = True) -> Iterator[int]:
    """Descriptor of a file that this process holds, until it lets go or dies. is_new: it is made.

    Raises BlockingIOError if a process that lives holds it, FileNotFoundError.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if is_new else 0), 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if is_new else fcntl.LOCK_NB))
            # A sweep may have come between the two and removed it.
            if is_new and not _is_at(path, descriptor):
                continue
            yield descriptor
            return
        finally:
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _announced_keys(announcement: Path) -> list[str]:
    if announcement.suffix != ".json":
        return [announcement.name.replace("+", "/")]  # by an earlier version: an empty file for each key
    try:
        return list(json.loads(announcement.read_bytes()))
    except ValueError:
        return []  # cut off, and so before anything was published


def is_disk_full(error: BaseException | None) -> bool:
    """Whether what went wrong is that a disk, or what a user may have of it, is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if type(error).__name__ == "SafetensorError" and "(os error 28)" in str(error):  # its library speaks in texts
            return True
        error = error.__cause__
    return False


def file_sha256(path: Path) -> str:
    """Of the file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep_private() -> None:
    """What this process, and those that it starts, write from now on is for their user alone: pictures, names, keys."""
    os.umask(0o077)


def remove(path: Path) -> None:
    """Removes a file, or a folder with all below it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it that are missing; their names outlast a power cut."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync_tree(path: Path) -> None:
    """Waits until the disk has a file, or a folder with all below it. Raises OSError."""
    if path.is_dir():
        for child in path.iterdir():
            sync_tree(child)
    sync(path)


def sync(path: Path) -> None:
    """Waits until the disk has a file's bytes, or a folder's names. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
