"""Text as people and their programs write it, and what in it is none."""

from __future__ import annotations

import re
import unicodedata

FIRST_MARK = re.compile("^\ufeff+", re.MULTILINE)


def decode(content: bytes) -> str:
    """UTF-8 as text whose lines all end in \\n, so that `split("\\n")` finds them. Raises UnicodeDecodeError.

    Marks of byte order are left out, also those inside that come of joining files. `str.splitlines` is not for text of
    others: it also cuts at U+2028, U+0085, VT and FF, which stand inside of prompts that were pasted from somewhere.
    """
    return FIRST_MARK.sub("", content.decode().replace("\r\n", "\n").replace("\r", "\n"))


def blank(text: str) -> bool:
    """Whether nothing can be seen of it: chat programs fill empty lines with U+200B."""
    return all(character.isspace() or unicodedata.category(character) == "Cf" for character in text)


def control(text: str) -> str | None:
    """Its first control character that is no space: NUL comes of UTF-16 read as UTF-8, ESC of a coloured terminal."""
    return next((c for c in text if c < " " and not c.isspace()), None)


def half_pair(text: str) -> str | None:
    """Its first half of a surrogate pair: of bytes that are not UTF-8, or of JSON. Neither tokenizers nor files take it."""
    return next((c for c in text if "\ud800" <= c <= "\udfff"), None)
