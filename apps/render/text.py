"""Reading text as people and programs write it, and finding what is not text."""

from __future__ import annotations

import re
import unicodedata

FIRST_MARK = re.compile("^\ufeff+", re.MULTILINE)


def decode(content: bytes) -> str:
    """Decode UTF-8, with all line ends turned into \\n, so that `split("\\n")` gives the lines. Raises UnicodeDecodeError.

    Byte order marks are removed, also those in the middle of joined files. `str.splitlines` will not do: it also splits at
    U+2028, U+0085, VT and FF, which occur inside pasted prompts.
    """
    return FIRST_MARK.sub("", content.decode().replace("\r\n", "\n").replace("\r", "\n"))


def blank(text: str) -> bool:
    """Whether the text has no visible character; chat programs fill empty lines with U+200B."""
    return all(character.isspace() or unicodedata.category(character) == "Cf" for character in text)


def control(text: str) -> str | None:
    """The first control character that is not a space: NUL comes from UTF-16 read as UTF-8, ESC from a coloured terminal."""
    return next((c for c in text if c < " " and not c.isspace()), None)


def half_pair(text: str) -> str | None:
    """The first lone surrogate, which comes from bytes that are not UTF-8, or from JSON; tokenizers and files refuse it."""
    return next((c for c in text if "\ud800" <= c <= "\udfff"), None)
