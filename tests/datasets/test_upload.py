"""Uploads arrive whole, counted and hashed, in pieces of any size; whatever is wrong with them has a name."""

import asyncio
import hashlib
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.datasets.upload import StagedUpload, receive
from app.errors import GraftError, InvalidRequest, RequestTimeout, StorageFull, TooLarge
from app.settings import MEBIBYTE

BOUNDARY = "boundary42"
FORM = f"multipart/form-data; boundary={BOUNDARY}"

Received = Callable[..., StagedUpload]


@pytest.fixture
def received(tmp_path: Path) -> Received:
    """Receives a body given as its chunks."""

    def run(
        *chunks: bytes,
        content_type: str | None = None,
        max_bytes: int = MEBIBYTE,
        idle_timeout_seconds: float = 10.0,
        check_room: Callable[[int], None] = lambda _incoming: None,
        body: AsyncIterator[bytes] | None = None,
    ) -> StagedUpload:
        return asyncio.run(
            receive(
                _chunks(chunks) if body is None else body,
                content_type=content_type,
                staged=tmp_path / "staged",
                text_fields=("name", "kind", "val_fraction", "seed", "purpose"),
                max_bytes=max_bytes,
                idle_timeout_seconds=idle_timeout_seconds,
                check_room=check_room,
            )
        )

    return run


async def _chunks(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def part(name: str, content: bytes, *, filename: str | None = None, headers: str = "") -> bytes:
    disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename is not None else "")
    return f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n{headers}\r\n".encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def assert_holds(upload: StagedUpload, content: bytes) -> None:
    assert upload.path.read_bytes() == content
    assert (upload.size_bytes, upload.sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("content_type", [None, "application/zip", "application/x-www-form-urlencoded", "nonsense"])
def test_body_as_it_is(received: Received, content_type: str | None) -> None:
    upload = received(b"PK", b"", b"content", content_type=content_type)
    assert_holds(upload, b"PKcontent")
    assert (upload.filename, upload.fields) == (None, {})


@pytest.mark.parametrize("name", ["file", "data"])
def test_form(received: Received, name: str) -> None:
    body = form(
        part("name", "Blümchen".encode()),
        part(name, b"PK\r\n--boundary4\r\n", filename="../flowers.zip", headers="Content-Type: application/zip\r\n"),
        part("seed", b"7"),
        part("val_fraction", b""),
        part("purpose", b"fine-tune"),
    )
    upload = received(body, content_type=FORM)
    assert_holds(upload, b"PK\r\n--boundary4\r\n")
    assert upload.filename == "../flowers.zip"
    assert upload.fields == {"name": "Blümchen", "seed": "7", "val_fraction": "", "purpose": "fine-tune"}


def test_file_field_without_a_file_name_is_the_file(received: Received) -> None:
    upload = received(form(part("file", b"PK")), content_type=FORM)
    assert (upload.filename, upload.size_bytes) == (None, 2)


@given(
    content=st.binary(min_size=1, max_size=300) | st.sampled_from([b"\r\n--boundary4", b"\r\n--" * 40, b"\r\n\r\n-"]),
    size=st.integers(1, 60),
)
@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_form_in_pieces_of_any_size(received: Received, content: bytes, size: int) -> None:
    body = form(part("name", b"x"), part("file", content, filename="a"), part("seed", b"1"))
    upload = received(*(body[i : i + size] for i in range(0, len(body), size)), content_type=FORM)
    assert_holds(upload, content)
    assert upload.fields == {"name": "x", "seed": "1"}


def test_file_is_for_its_owner_alone(received: Received) -> None:
    assert received(b"PK").path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("body", "content_type", "error", "code"),
    [
        (b"", None, InvalidRequest, "empty-upload"),
        (form(part("file", b"", filename="a.zip")), FORM, InvalidRequest, "empty-upload"),
        (form(part("name", b"x")), FORM, InvalidRequest, "missing-file"),
        (form(), FORM, InvalidRequest, "missing-file"),
        (b"", FORM, InvalidRequest, "malformed-form"),
        (b"PK\x03\x04", FORM, InvalidRequest, "malformed-form"),
        (part("file", b"PK"), FORM, InvalidRequest, "malformed-form"),
        (form(part("file", b"PK"))[:-30], FORM, InvalidRequest, "malformed-form"),
        (form(part("file", b"PK")), "multipart/form-data", InvalidRequest, "malformed-form"),
        (form(part("file", b"PK")), "multipart/form-data; boundary=" + "x" * 500, InvalidRequest, "malformed-form"),
        (form(b"--boundary42\r\n\r\nPK\r\n"), FORM, InvalidRequest, "malformed-form"),
        (form(part("file", b"PK"), part("data", b"PK")), FORM, InvalidRequest, "more-than-one-file"),
        (form(part("name", b"a"), part("name", b"b"), part("file", b"PK")), FORM, InvalidRequest, "invalid-request"),
        (form(part("colour", b"a"), part("file", b"PK")), FORM, InvalidRequest, "invalid-request"),
        (form(part("other", b"PK", filename="a.zip")), FORM, InvalidRequest, "invalid-request"),
        (form(part("name", b"\xff"), part("file", b"PK")), FORM, InvalidRequest, "invalid-request"),
        (form(part("name", b"x" * 65537), part("file", b"PK")), FORM, TooLarge, "too-large"),
        (
            form(*[part("name", b"a", headers="X: " + "y" * 3000 + "\r\nY: " + "y" * 6000 + "\r\n")]),
            FORM,
            TooLarge,
            "too-large",
        ),
    ],
)
def test_what_is_wrong_has_a_name(
    received: Received, body: bytes, content_type: str | None, error: type[GraftError], code: str
) -> None:
    with pytest.raises(error) as raised:
        received(body, content_type=content_type)
    assert raised.value.code == code


def test_twenty_parts_are_taken_and_one_more_is_not(tmp_path: Path, received: Received) -> None:
    texts = [part(name, b"x") for name in ("name", "seed", "purpose", "val_fraction")]
    assert received(form(*texts, part("file", b"PK")), content_type=FORM).size_bytes == 2
    preamble = form(*[part("file", b"PK"), *texts, *([part("name", b"x")] * 17)])
    with pytest.raises((TooLarge, InvalidRequest)):
        received(preamble, content_type=FORM)


def test_unknown_field_is_pointed_at(received: Received) -> None:
    with pytest.raises(InvalidRequest) as raised:
        received(form(part("val/fracton", b"0.5"), part("file", b"PK")), content_type=FORM)
    assert [error.pointer for error in raised.value.errors] == ["#/val~1fracton"]


@pytest.mark.parametrize("content_type", [None, FORM])
def test_upload_at_the_limit_is_taken_and_a_byte_more_is_not(received: Received, content_type: str | None) -> None:
    def body(count: int) -> bytes:
        return bytes(count) if content_type is None else form(part("file", bytes(count)))

    assert received(body(1000), content_type=content_type, max_bytes=1000).size_bytes == 1000
    with pytest.raises(TooLarge):
        received(body(1001), content_type=content_type, max_bytes=1000)


def test_too_large_an_upload_is_refused_before_its_end(received: Received) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(100_000)

    for content_type in (None, FORM):
        with pytest.raises((TooLarge, InvalidRequest)):
            received(body=endless(), content_type=content_type)


def test_bytes_after_the_form_are_counted_too(received: Received) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield form(part("file", b"PK"))
        while True:
            yield bytes(100_000)

    with pytest.raises(TooLarge):
        received(body=endless(), content_type=FORM)


def test_silence_ends_the_upload(received: Received) -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield b"PK"
        await asyncio.Event().wait()

    with pytest.raises(RequestTimeout):
        received(body=stalled(), idle_timeout_seconds=0.05)


def test_client_that_goes_away_is_passed_on(received: Received) -> None:
    class Gone(Exception):
        pass

    async def broken() -> AsyncIterator[bytes]:
        yield b"PK"
        raise Gone

    with pytest.raises(Gone):
        received(body=broken())


def test_full_disk_is_told(received: Received) -> None:
    asked: list[int] = []

    def check_room(incoming_bytes: int) -> None:
        asked.append(incoming_bytes)
        if incoming_bytes:
            raise StorageFull("full")

    with pytest.raises(StorageFull):
        received(b"PK", check_room=check_room)
    assert asked == [0, MEBIBYTE]  # the most that can come


@pytest.mark.parametrize("content_type", [None, FORM])
def test_memory_does_not_grow_with_the_upload(received: Received, content_type: str | None) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"" if content_type is None else part("file", b"")[:-2]
        for _ in range(64 * 16):
            yield bytes(65536)
        yield b"" if content_type is None else b"\r\n" + form()

    tracemalloc.start()
    upload = received(body=body(), content_type=content_type, max_bytes=100 * MEBIBYTE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert upload.size_bytes == 64 * MEBIBYTE
    assert peak < 6 * MEBIBYTE
