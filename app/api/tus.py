"""The headers of tus 1.0.0, the protocol of resumable uploads (tus.io/protocols/resumable-upload): read, and written.

Core protocol with creation, creation-with-upload, expiration, checksum and termination.
"""

import base64
import binascii
import re
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Annotated, Any

from fastapi import Header, Request

from app.api.openapi import REQUIRED
from app.datasets.partial import Checksum
from app.errors import FieldError, InvalidRequest, PreconditionFailed, UnsupportedMediaType

VERSION = "1.0.0"
EXTENSIONS = "creation,creation-with-upload,expiration,checksum,termination"
CHECKSUM_ALGORITHMS = ("sha1", "sha256")
PIECE = "application/offset+octet-stream"

_ABOVE_ZERO = "[1-9][0-9]{0,14}"  # a petabyte is enough; Graft's own limit is a setting
_NUMBER = re.compile(f"0|{_ABOVE_ZERO}")
_METADATA_KEY = re.compile(r"[!-+\--~]{1,100}")  # visible ASCII but the comma

_BASE64 = "[A-Za-z0-9+/]"
_PAIR = f"{_METADATA_KEY.pattern}( ({_BASE64}{{4}})*({_BASE64}{{2}}==|{_BASE64}{{3}}=)?)?"
_DIGESTS = f"sha1 {_BASE64}{{27}}=|sha256 {_BASE64}{{43}}="


def _needed(description: str, **schema: Any) -> Any:
    """A header that is needed, though what is said where it is missing is not FastAPI's 422."""
    return Header(description=description, json_schema_extra={REQUIRED: True, **schema})


TusResumable = Annotated[str | None, _needed(f"The protocol's version: {VERSION}.", enum=[VERSION])]
UploadLength = Annotated[str | None, _needed("Of the whole archive, in bytes.", pattern=f"^{_ABOVE_ZERO}$")]
UploadOffset = Annotated[
    str | None, _needed("Where the piece begins: how many bytes there are.", pattern=f"^({_NUMBER.pattern})$")
]
UploadMetadata = Annotated[
    str | None,
    Header(
        description="`filename`, `name`, `kind`, `val_fraction` and `seed` as POST /v1/datasets has them: each key, a "
        "space, and its value in base64; separated by commas. Other keys are kept and mean nothing.",
        json_schema_extra={"pattern": f"^({_PAIR}(,{_PAIR})*)?$"},
    ),
]
UploadChecksum = Annotated[
    str | None,
    Header(
        description=f"Of this piece: {' or '.join(CHECKSUM_ALGORITHMS)}, a space, the digest in base64.",
        json_schema_extra={"pattern": f"^({_DIGESTS})$"},
    ),
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
    if not _NUMBER.fullmatch(given):
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
