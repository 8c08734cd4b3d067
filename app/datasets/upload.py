"""A request body on its way in → a staged file with its size and digest, in constant memory.

Knows an asynchronous stream of bytes and a Content-Type; not requests, not archives. What is written lies where the
caller says, in staging, and the caller's staging removes it whatever goes wrong here.
"""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
import anyio.to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.errors import FieldError, InvalidRequest, RequestTimeout, StorageFull, TooLarge

FILE_FIELDS = ("file", "data")

MAX_PARTS = 20
MAX_TEXT_BYTES = 64 * 1024
MAX_PART_HEADER_BYTES = 8 * 1024
# Boundaries, part headers and text fields around the file; also what a client may send after it.
MAX_OVERHEAD_BYTES = MAX_PARTS * (MAX_TEXT_BYTES + MAX_PART_HEADER_BYTES)

# Handed to a thread at a time: large enough that threads cost nothing, small enough for many uploads at once.
_BUFFER_BYTES = 1024**2
_ROOM_CHECK_BYTES = 64 * 1024**2
# A client slower than this on average, once it had the time to start, holds a connection and a file for nothing.
_MIN_BYTES_PER_SECOND = 2048
_RATE_CHECK_AFTER_SECONDS = 20.0


@dataclass(frozen=True)
class StagedUpload:
    """An upload that has arrived whole. fields: the text fields that came with it, by name."""

    path: Path
    size_bytes: int
    sha256: str
    filename: str | None
    fields: dict[str, str] = field(default_factory=dict)


async def receive(
    body: AsyncIterator[bytes],
    *,
    content_type: str | None,
    staged: Path,
    text_fields: Collection[str],
    max_bytes: int,
    idle_timeout_seconds: float,
    check_room: Callable[[int], None],
) -> StagedUpload:
    """Writes the file in `body` to `staged`: a multipart form's one file, or for any other type the body as it is.

    text_fields: that a form may have beside the file.
    check_room: called now and then with the bytes that are about to be written; raises StorageFull.
    Raises TooLarge as soon as the file is, RequestTimeout for a body that stops coming, InvalidRequest for a form that
    is malformed, incomplete or more than one file, and whatever `body` raises when the client goes away.
    """
    kind, options = parse_options_header(content_type)
    with _StagedFile(staged, max_bytes=max_bytes, check_room=check_room) as file:
        paced = _paced(body, idle_timeout_seconds=idle_timeout_seconds)
        if kind == b"multipart/form-data":
            form = _Form(file, text_fields)
            return await _receive_form(paced, file, form, boundary=options.get(b"boundary", b""), max_bytes=max_bytes)
        async for chunk in paced:
            file.append(chunk)
            await file.flush_if_full()
        return await file.finish(filename=None, fields={})


async def _paced(body: AsyncIterator[bytes], *, idle_timeout_seconds: float) -> AsyncIterator[bytes]:
    """The body's chunks; only the time spent waiting for the client counts against it."""
    waited_seconds = 0.0
    received_bytes = 0
    while True:
        began = time.monotonic()
        try:
            async with asyncio.timeout(idle_timeout_seconds):
                chunk = await anext(body, None)
        except TimeoutError:
            raise RequestTimeout(
                f"The upload stopped for more than {idle_timeout_seconds:g} seconds; send it again."
            ) from None
        if chunk is None:
            return
        waited_seconds += time.monotonic() - began
        received_bytes += len(chunk)
        if waited_seconds > _RATE_CHECK_AFTER_SECONDS and received_bytes < _MIN_BYTES_PER_SECOND * waited_seconds:
            raise RequestTimeout("The upload is too slow to be kept waiting for; send it again.")
        yield chunk


class _StagedFile:
    """The file being written: buffered, counted and hashed. Disk work happens in threads, in `flush_if_full`."""

    def __init__(self, path: Path, *, max_bytes: int, check_room: Callable[[int], None]) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._check_room = check_room
        self._buffer = bytearray()
        self._digest = hashlib.sha256()
        self._room_checked_to = 0
        self.size_bytes = 0

    def __enter__(self) -> Self:
        self._check_room(0)
        # Unbuffered: the buffer is ours. Only its owner may read what strangers upload.
        self._file = open(self._path, "wb", buffering=0, opener=_private)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def append(self, data: bytes) -> None:
        self.size_bytes += len(data)
        if self.size_bytes > self._max_bytes:
            raise TooLarge(f"The upload is larger than {self._max_bytes} bytes, the most this server takes.")
        self._buffer += data

    async def flush_if_full(self) -> None:
        if len(self._buffer) >= _BUFFER_BYTES:
            await self._flush()

    async def finish(self, *, filename: str | None, fields: dict[str, str]) -> StagedUpload:
        await self._flush()
        if self.size_bytes == 0:
            raise InvalidRequest("The upload is empty; send an archive of images.", code="empty-upload")
        return StagedUpload(self._path, self.size_bytes, self._digest.hexdigest(), filename, fields)

    async def _flush(self) -> None:
        buffer, self._buffer = self._buffer, bytearray()
        await anyio.to_thread.run_sync(self._write, buffer)

    def _write(self, buffer: bytearray) -> None:
        if self.size_bytes >= self._room_checked_to:
            self._check_room(_ROOM_CHECK_BYTES)
            self._room_checked_to = self.size_bytes + _ROOM_CHECK_BYTES
        self._digest.update(buffer)
        view = memoryview(buffer)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise StorageFull("The server could not store the upload: its disk is full or failing.") from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


# Forms


async def _receive_form(
    body: AsyncIterator[bytes], file: _StagedFile, form: "_Form", *, boundary: bytes, max_bytes: int
) -> StagedUpload:
    if not boundary:
        raise _malformed("its Content-Type has no boundary")
    received_bytes = 0
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": form.begin_part,
                "on_header_field": form.add_header_name,
                "on_header_value": form.add_header_value,
                "on_header_end": form.end_header,
                "on_headers_finished": form.begin_content,
                "on_part_data": form.add_content,
                "on_part_end": form.end_part,
                "on_end": form.end,
            },
            max_header_size=MAX_PART_HEADER_BYTES,
        )
        async for chunk in body:
            received_bytes += len(chunk)
            if received_bytes > max_bytes + MAX_OVERHEAD_BYTES:
                raise TooLarge(f"The upload is larger than {max_bytes} bytes, the most this server takes.")
            # A server hands over what it has read, at most some hundred kB; a test may hand over everything at once.
            for start in range(0, len(chunk), _BUFFER_BYTES):
                parser.write(chunk[start : start + _BUFFER_BYTES])
                await file.flush_if_full()
    except FormParserError:
        raise _malformed("it does not follow multipart/form-data") from None
    if not form.is_complete:
        raise _malformed("it ends before its last boundary")
    if not form.has_file:
        raise InvalidRequest(
            'The form has no file; send the archive as the field "file".',
            code="missing-file",
            errors=[FieldError("#/file", "is missing")],
        )
    return await file.finish(filename=form.filename, fields=form.fields)


class _Form:
    """What the parser's callbacks put together."""

    def __init__(self, file: _StagedFile, text_fields: Collection[str]) -> None:
        self._file = file
        self._text_fields = text_fields
        self._parts = 0
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._field: str | None = None  # None while the content is the file's
        self._text = bytearray()
        self.has_file = False
        self.is_complete = False
        self.filename: str | None = None
        self.fields: dict[str, str] = {}

    def begin_part(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise TooLarge(f"The form has more than {MAX_PARTS} parts.")
        self._headers = {}
        self._header_bytes = 0

    def add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_name += data[start:end]

    def add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_value += data[start:end]

    def end_header(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def begin_content(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise _malformed("a part has no name")
        name = options[b"name"].decode("utf-8", "replace")
        if name in FILE_FIELDS:
            if self.has_file:
                raise InvalidRequest("The form has more than one file; send one archive.", code="more-than-one-file")
            self.has_file = True
            self._field = None
            self.filename = options[b"filename"].decode("utf-8", "replace") if b"filename" in options else None
        elif name in self._text_fields and b"filename" not in options:
            if name in self.fields:
                raise InvalidRequest(
                    f'The form has the field "{name}" twice.', errors=[FieldError(f"#/{name}", "twice")]
                )
            self._field = name
            self._text.clear()
        else:
            known = ", ".join((*FILE_FIELDS, *self._text_fields))
            raise InvalidRequest(
                'The form has a field that is not known; the archive goes into "file".',
                errors=[FieldError(f"#/{_pointer(name)}", f"is not one of {known}")],
            )

    def add_content(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._file.append(data[start:end])
        else:
            self._text += data[start:end]
            if len(self._text) > MAX_TEXT_BYTES:
                raise TooLarge(f'The field "{self._field}" is longer than {MAX_TEXT_BYTES} bytes.')

    def end_part(self) -> None:
        if self._field is None:
            return
        try:
            self.fields[self._field] = self._text.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidRequest(
                f'The field "{self._field}" is not UTF-8 text.', errors=[FieldError(f"#/{self._field}", "is not UTF-8")]
            ) from None

    def end(self) -> None:
        self.is_complete = True

    def _count_header(self, count: int) -> None:
        self._header_bytes += count
        if self._header_bytes > MAX_PART_HEADER_BYTES:
            raise TooLarge(f"A part of the form has more than {MAX_PART_HEADER_BYTES} bytes of headers.")


def _malformed(why: str) -> InvalidRequest:
    return InvalidRequest(f"The form cannot be read: {why}.", code="malformed-form")


def _pointer(name: str) -> str:
    """A caller's field name within a JSON pointer (RFC 6901), short and printable."""
    printable = "".join(c for c in name[:100] if c.isprintable())
    return printable.replace("~", "~0").replace("/", "~1")
