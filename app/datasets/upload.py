"""A request body on its way in → a staged file with its size and digest, in constant memory.

Knows an asynchronous stream of bytes and a Content-Type; not requests, not archives. What is written lies where the
caller says, in staging, and the caller's staging removes it whatever goes wrong here.
"""

import hashlib
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.datasets.incoming import BUFFER_BYTES, FileWriter, open_private, paced
from app.errors import FieldError, InvalidRequest, TooLarge

FILE_FIELDS = ("file", "data")

MAX_PARTS = 20
MAX_TEXT_BYTES = 64 * 1024
MAX_PART_HEADER_BYTES = 8 * 1024
# Boundaries, part headers and text fields around the file; also what a client may send after it.
MAX_OVERHEAD_BYTES = MAX_PARTS * (MAX_TEXT_BYTES + MAX_PART_HEADER_BYTES)


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
    check_room(0)
    digest, form = hashlib.sha256(), None
    with open_private(staged) as file:
        writer = FileWriter(file, max_bytes=max_bytes, check_room=check_room, digest=digest)
        chunks = paced(body, idle_timeout_seconds=idle_timeout_seconds)
        if kind == b"multipart/form-data":
            form = _Form(writer, text_fields)
            await _receive_form(chunks, writer, form, boundary=options.get(b"boundary", b""), max_bytes=max_bytes)
        else:
            async for chunk in chunks:
                writer.append(chunk)
                await writer.flush_if_full()
        await writer.flush()
    if writer.size_bytes == 0:
        raise InvalidRequest("The upload is empty; send an archive of images.", code="empty-upload")
    return StagedUpload(
        path=staged,
        size_bytes=writer.size_bytes,
        sha256=digest.hexdigest(),
        filename=None if form is None else form.filename,
        fields={} if form is None else form.fields,
    )


# Forms


async def _receive_form(
    body: AsyncIterator[bytes], file: FileWriter, form: "_Form", *, boundary: bytes, max_bytes: int
) -> None:
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
            for start in range(0, len(chunk), BUFFER_BYTES):
                parser.write(chunk[start : start + BUFFER_BYTES])
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


class _Form:
    """What the parser's callbacks put together."""

    def __init__(self, file: FileWriter, text_fields: Collection[str]) -> None:
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
