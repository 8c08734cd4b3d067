"""What a power cut would leave: system calls of real processes, done again to a disk that forgets what nobody synced.

strace writes down what processes do to files, and when they answer. Here that is done again to a `Disk`, which is as
strict as POSIX lets a real one be: bytes are there after a cut once their file was synced, names once their folder was.
So at each answer it can be seen what a cut at that moment would have left, and a server can be started on it.
"""

import codecs
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

STRACE = shutil.which("strace")
# More than any write whose bytes are needed: pages of the database, answers, archives of tests.
_LONGEST_STRING = 65536
_CALLS = (
    "open,openat,creat,write,pwrite64,writev,pwritev,ftruncate,fallocate,copy_file_range,sendfile,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,"
    "fsync,fdatasync,sendto,sendmsg"
)


def strace(trace: Path) -> list[str]:
    """Before a command: has it, and all that it starts, written down to `trace`."""
    assert STRACE is not None
    options = ["-f", "--seccomp-bpf", "-y", "-qqq", "-x", "-s", str(_LONGEST_STRING), "-e", f"trace={_CALLS}"]
    return [STRACE, *options, "-e", "signal=none", "-o", str(trace)]


@dataclass(eq=False)
class File:
    """version: grows with each change. is_appended_to: whether a `write` goes to the end; to where else is in no trace.

    data: None where it is not known. What is written through a memory map is not seen at all.
    """

    data: bytearray | None = field(default_factory=bytearray)
    version: int = 0
    is_appended_to: bool = False
    synced_data: bytes | None = b""
    synced_version: int = 0

    @property
    def is_synced(self) -> bool:
        return self.version == self.synced_version

    def write(self, data: bytes | None, at: int | None) -> None:
        """data: None if it is not known. at: None for the end."""
        self.version += 1
        if self.data is None or data is None:
            self.data = None
            return
        at = len(self.data) if at is None else at
        self.data.extend(bytes(max(at - len(self.data), 0)))
        self.data[at : at + len(data)] = data

    def truncate(self, length: int) -> None:
        self.version += 1
        if self.data is not None:
            del self.data[length:]
            self.data.extend(bytes(length - len(self.data)))


@dataclass(eq=False)
class Folder:
    names: dict[str, "File | Folder"] = field(default_factory=dict)
    synced_names: dict[str, "File | Folder"] = field(default_factory=dict)


Sync = Callable[[], None]


class Disk:
    """One folder of the real disk, by what was done to it. What is there at first is taken as synced."""

    def __init__(self, root: Path) -> None:
        self._path = str(root.resolve())
        self.root = _as_it_is(root)

    def holds(self, path: str) -> bool:
        return path.startswith(self._path + "/")

    def find(self, path: str) -> "File | Folder | None":
        """As a process sees it."""
        found: File | Folder | None = self.root
        for name in self._names(path):
            found = found.names.get(name) if isinstance(found, Folder) else None
        return found

    def put(self, path: str, what: "File | Folder") -> None:
        folder, name = self._place(path)
        folder.names[name] = what

    def take(self, path: str) -> "File | Folder":
        folder, name = self._place(path)
        return folder.names.pop(name)

    def begin_sync(self, path: str) -> Sync:
        """What is to be done once the call has returned: later changes are not in it."""
        found = self.find(path)
        if isinstance(found, Folder):
            folder, names = found, dict(found.names)
            return lambda: folder.synced_names.update(names) or _drop_others(folder.synced_names, names)
        if found is None:
            return lambda: None
        file, data, version = found, None if found.data is None else bytes(found.data), found.version

        def apply() -> None:
            file.synced_data, file.synced_version = data, version

        return apply

    def unsynced(self) -> set[str]:
        """What a cut would take: paths below the root of files whose bytes, or names whose folders, are not synced."""
        return {name for name, _ in _unsynced(self.root, "")}

    def leave(self, target: Path, *, as_now: Path) -> None:
        """Writes what a cut at this moment would leave to a new folder.

        as_now: the folder as it is now, for files whose bytes are in no trace, and which have not changed since.
        """
        _leave(self.root, target, as_now)

    def _names(self, path: str) -> list[str]:
        return [name for name in path.removeprefix(self._path).split("/") if name not in ("", ".")]

    def _place(self, path: str) -> tuple[Folder, str]:
        parent, _, name = path.rstrip("/").rpartition("/")
        folder = self.find(parent)
        assert isinstance(folder, Folder), f"{parent} is no folder in the trace"
        return folder, name


def _drop_others(names: dict[str, "File | Folder"], wanted: dict[str, "File | Folder"]) -> None:
    for name in names.keys() - wanted.keys():
        del names[name]


def _as_it_is(path: Path) -> Folder:
    folder = Folder()
    for child in path.iterdir():
        data = None if child.is_dir() else child.read_bytes()
        folder.names[child.name] = _as_it_is(child) if data is None else File(bytearray(data), synced_data=data)
    folder.synced_names = dict(folder.names)
    return folder


def _unsynced(folder: Folder, path: str) -> Iterator[tuple[str, "File | Folder"]]:
    for name, what in folder.names.items():
        own = f"{path}{name}"
        if folder.synced_names.get(name) is not what or (isinstance(what, File) and not what.is_synced):
            yield own, what
        if isinstance(what, Folder):
            yield from _unsynced(what, f"{own}/")


def _leave(folder: Folder, target: Path, as_now: Path) -> None:
    target.mkdir()
    for name, what in folder.synced_names.items():
        if isinstance(what, Folder):
            _leave(what, target / name, as_now / name)
        elif what.synced_data is not None:
            (target / name).write_bytes(what.synced_data)
        elif what.is_synced and (as_now / name).is_file():
            shutil.copyfile(as_now / name, target / name)
        else:
            (target / name).touch()


# The trace


@dataclass(frozen=True)
class Call:
    """arguments: as strace shows them. is_end: whether it has returned, and not only begun."""

    name: str
    arguments: str
    result: int
    is_begin: bool
    is_end: bool
    thread: int


_LINE = re.compile(r"^(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)$", re.DOTALL)
_END = re.compile(r"^(.*)\) += (-?\d+|0x[0-9a-f]+|\?)(.*)$", re.DOTALL)
_UNFINISHED = " <unfinished ...>"
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(\.\.\.)?')
_DESCRIPTOR = re.compile(r"(?:\d+|AT_FDCWD)<((?:[^<>\\]|\\.|->)*)>(\(deleted\))?")
_AT = re.compile(r'AT_FDCWD(?:<((?:[^<>\\]|\\.)*)>)?|(\d+)<((?:[^<>\\]|\\.)*)>(?=, ")')


def calls(lines: Iterable[str]) -> Iterator[Call]:
    """In the order in which they began and ended."""
    begun: dict[int, str] = {}
    for line in lines:
        parsed = _LINE.match(line.rstrip("\n"))
        if parsed is None:
            continue  # a process that ended
        thread, resumed, name, rest = int(parsed[1]), parsed[2], parsed[3], parsed[4]
        if rest.endswith(_UNFINISHED):
            begun[thread] = rest.removesuffix(_UNFINISHED)
            yield Call(name, begun[thread], 0, is_begin=True, is_end=False, thread=thread)
            continue
        ended = _END.match(begun.pop(thread, "") + rest if resumed else rest)
        if ended is not None:
            result = -1 if ended[2] == "?" else int(ended[2], 0)
            yield Call(resumed or name, ended[1], result, is_begin=not resumed, is_end=True, thread=thread)


def text_of(quoted: str) -> bytes:
    """A string of strace's, without its quotation marks, as bytes."""
    return bytes(codecs.escape_decode(quoted.encode("latin-1", "backslashreplace"))[0])


def replay(trace: Path, disk: Disk, on_sent: Callable[[bytes], None]) -> None:
    """Does to the disk what was done to the real one. on_sent: told of what goes to a socket or a pipe, as it does."""
    player = _Player(disk, on_sent)
    with trace.open(encoding="utf-8", errors="surrogateescape") as lines:
        for call in calls(lines):
            player.play(call)


class _Player:
    def __init__(self, disk: Disk, on_sent: Callable[[bytes], None]) -> None:
        self._disk = disk
        self._on_sent = on_sent
        self._syncing: dict[int, Sync] = {}

    def play(self, call: Call) -> None:
        name = call.name.removesuffix("64")
        if name in ("write", "writev", "pwrite", "pwritev", "sendto", "sendmsg", "ftruncate", "fallocate"):
            self._change(name, call)
        elif name in ("fsync", "fdatasync"):
            self._sync(call)
        elif call.is_end and call.result >= 0:
            self._name(name, call)

    def _change(self, name: str, call: Call) -> None:
        """Bytes count as lost from the moment that writing them begins, and as written when it has ended."""
        target = _DESCRIPTOR.match(call.arguments)
        if target is None or target[2]:
            return
        path = _path(target[1])
        if not self._disk.holds(path):
            if call.is_begin and re.match(r"socket:|pipe:|TCP|UNIX", path):
                self._on_sent(b"".join(text_of(text) for text, _ in _STRING.findall(call.arguments)))
            return
        file = self._disk.find(path)
        if not isinstance(file, File):
            return  # it has no name any more
        if not call.is_end:
            file.version += 1
        elif call.result >= 0:
            numbers = [int(number) for number in re.findall(r", (-?\d+)(?=,|$)", call.arguments)]
            if name == "ftruncate":
                file.truncate(numbers[-1])
            elif name == "fallocate":
                file.write(None, 0)
            elif name.startswith("pwrite"):
                file.write(_written(call), numbers[-1])
            else:
                file.write(_written(call) if file.is_appended_to else None, None)

    def _sync(self, call: Call) -> None:
        target = _DESCRIPTOR.match(call.arguments)
        assert target is not None
        path = _path(target[1])
        if target[2] or not (self._disk.holds(path) or self._disk.holds(path + "/")):
            return
        if call.is_begin:
            self._syncing[call.thread] = self._disk.begin_sync(path)
        if call.is_end:
            apply = self._syncing.pop(call.thread)
            if call.result == 0:
                apply()

    def _name(self, name: str, call: Call) -> None:
        if name in ("copy_file_range", "sendfile"):
            for target, _ in _DESCRIPTOR.findall(call.arguments):
                file = self._disk.find(_path(target)) if self._disk.holds(_path(target)) else None
                if isinstance(file, File):
                    file.write(None, 0)
            return
        paths = _paths(call)
        ours = [self._disk.holds(path) for path in paths]
        if not any(ours):
            return
        match name.removesuffix("at").removesuffix("at2"):
            case "open" | "creat":
                self._open(paths[0], call.arguments)
            case "mkdir":
                self._disk.put(paths[0], Folder())
            case "rename":
                assert all(ours), f"a move between disks: {paths}"
                self._disk.put(paths[1], self._disk.take(paths[0]))
            case "link":
                linked = self._disk.find(paths[0])
                assert linked is not None
                self._disk.put(paths[1], linked)
            case "unlink" | "rmdir":
                with suppress(KeyError):
                    self._disk.take(paths[0])
            case other:
                raise AssertionError(f"{other} of {paths} is not understood")

    def _open(self, path: str, arguments: str) -> None:
        found = self._disk.find(path)
        if found is None and "O_CREAT" in arguments:
            found = File()
            self._disk.put(path, found)
        elif isinstance(found, File) and "O_TRUNC" in arguments:
            found.truncate(0)
        if isinstance(found, File) and ("O_WRONLY" in arguments or "O_RDWR" in arguments):
            found.is_appended_to = "O_APPEND" in arguments


def _written(call: Call) -> bytes | None:
    """None if strace has left out some of it."""
    found = _STRING.findall(call.arguments)
    if any(is_cut for _, is_cut in found):
        return None
    return b"".join(text_of(text) for text, _ in found)[: call.result]


def _path(shown: str) -> str:
    return text_of(shown).decode("utf-8", "surrogateescape")


def _paths(call: Call) -> list[str]:
    """Of a call that names files, absolute."""
    folders = [_path(cwd or folder) for cwd, _, folder in _AT.findall(call.arguments)]
    names = [_path(text) for text, _ in _STRING.findall(call.arguments)]
    if call.name.endswith(("at", "at2")) and folders:
        return [
            f"{folder}/{name}" if not name.startswith("/") else name
            for folder, name in zip(folders, names, strict=False)
        ]
    return names
