"""What names that people give may hold, and which are too alike to stand beside each other."""

import re
import unicodedata

# With the two line separators of Unicode, and surrogates, which no answer can be written with. Blanks of every script
# and the joiners that Persian and emoji need are not among them, though `str.isprintable` leaves them out.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def has_control_characters(text: str) -> bool:
    """Whether a name holds what no name may: control characters, line separators, lone surrogates."""
    return _CONTROL_CHARACTERS.search(text) is not None


def folded(name: str) -> str:
    """The same for names that a file system which folds case, normalises or trims would take for one folder."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).rstrip(" .\u00a0").lstrip()
