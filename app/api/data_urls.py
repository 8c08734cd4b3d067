"""Bytes within JSON: base64, bare or in a data URL. Knows text; not requests."""

import base64
import re

_DATA_URL = re.compile(r"data:[\w.+/-]*(;[\w.+=-]*)*,", re.ASCII)


def bytes_of(text: str) -> bytes:
    """Line breaks are fine, as `base64` writes them. Raises ValueError for what is not base64."""
    prefix = _DATA_URL.match(text)
    payload = "".join((text[prefix.end() :] if prefix else text).split())
    return base64.b64decode(payload, validate=True)
