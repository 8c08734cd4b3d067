"""The headers of tus 1.0.0, the protocol of resumable uploads (tus.io/protocols/resumable-upload): read, and written.

Core protocol with creation, creation-with-upload, expiration, checksum and termination.
"""

import base64
import binascii
import re
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Annotated

from fastapi import Header, Request

from app.datasets.partial import Checksum
from app.errors import FieldError, InvalidRequest, PreconditionFailed, UnsupportedMediaType

VERSION = "1.0.0"
EXTENSIONS = "creation,creation-with-upload,expiration,checksum,termination"
CHECKSUM_ALGORITHMS = ("sha1", "sha256")
PIECE = "application/offset+octet-stream"

# Beyond what a file system or a client can count to; Graft's own limit is a setting.
_LARGEST_NUMBER = 2**53 - 1
_METADATA_KEY = re.compile(r"[!-+\--~]{1,100}")  # visible ASCII but the comma

_NUMBER = {"pattern": "^[0-9]{1,16}$"}

TusResumable = Annotated[
    str | None, Header(description=f"The protocol's version: {VERSION}.", json_schema_extra={"enum": [VERSION]})
]
UploadLength = Annotated[str | None, Header(description="Of the whole archive, in bytes.", json_schema_extra=_NUMBER)]
UploadOffset = Annotated[
    str | None, Header(description="Where the piece begins: how many bytes there are.", json_schema_extra=_NUMBER)
]
UploadMetadata = Annotated[
    str | None,
    Header(
        description="`filename`, `name`, `kind`, `val_fraction` and `seed` as POST /v1/datasets has them: each key, a "
        "space, and its value in base64; separated by commas. Other keys are kept and mean nothing."
    ),
]
UploadChecksum = Annotated[
    str | None, Header(description=f"Of this piece: {' or '.join(CHECKSUM_ALGORITHMS)}, a space, the digest in base64.")
]


class ChecksumUnknown(InvalidRequest):
    status = 400  # as tus has it
    code = "checksum-algorithm-unknown"
    title = "The checksum cannot be held against the piece"


def check_version(given: str | None) -> None:
    """Raises PreconditionFailed."""
    if given != VERSION:
        raise PreconditionFailed(
            f"Resumable uploads speak tus {VERSION}: send the header `Tus-Resumable: {VERSION}`. To upload an archive "
            "in one request, use POST /v1/datasets.",
            code="tus-version",
        )


def is_piece(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == PIECE


def check_is_piece(request: Request) -> None:
    """Raises UnsupportedMediaType."""
    if not is_piece(request):
        raise UnsupportedMediaType(f"A piece of an upload has the Content-Type {PIECE}.")


def has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


def number(name: str, given: str | None) -> int:
    """Raises InvalidRequest for what is missing or no number of bytes."""
    if given is None:
        raise InvalidRequest(f"The header {name} is missing.", errors=[FieldError(f"#/{name}", "is required")])
    if not (given.isascii() and given.isdigit() and int(given[:17]) <= _LARGEST_NUMBER and len(given) < 17):
        raise InvalidRequest(
            f"The header {name} is not a number of bytes.", errors=[FieldError(f"#/{name}", "is no number of bytes")]
        )
    return int(given)


def metadata(given: str) -> dict[str, str]:
    """What Upload-Metadata says, by key. Raises InvalidRequest."""
    found: dict[str, str] = {}
    for pair in given.split(",") if given.strip() else ():
        key, _, encoded = pair.strip().partition(" ")
        if not _METADATA_KEY.fullmatch(key) or key in found:
            raise _bad_metadata("each pair begins with a key, of visible ASCII characters and only once")
        try:
            found[key] = base64.b64decode(encoded.strip(), validate=True).decode()
        except (binascii.Error, ValueError):
            raise _bad_metadata(f'the value of "{key}" is not UTF-8 text in base64') from None
    return found


def checksum(given: str | None) -> Checksum | None:
    """Raises ChecksumUnknown for an algorithm that is not offered, InvalidRequest for what is no digest of it."""
    if given is None:
        return None
    algorithm, _, encoded = given.strip().partition(" ")
    if algorithm not in CHECKSUM_ALGORITHMS:
        raise ChecksumUnknown(f"Upload-Checksum may be {' or '.join(CHECKSUM_ALGORITHMS)}.")
    try:
        return Checksum(algorithm, base64.b64decode(encoded.strip(), validate=True))
    except (binascii.Error, ValueError):
        raise InvalidRequest(
            "Upload-Checksum is an algorithm, a space, and the digest in base64.",
            errors=[FieldError("#/Upload-Checksum", "the digest is not base64")],
        ) from None


def http_date(at: datetime) -> str:
    """As Upload-Expires has it (RFC 9110)."""
    return format_datetime(at.astimezone(UTC), usegmt=True)


def _bad_metadata(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"Upload-Metadata cannot be read: {why}.", errors=[FieldError("#/Upload-Metadata", "cannot be read")]
    )
