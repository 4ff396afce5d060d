"""Generated blocks of Markdown files, which lie between two marks, and the processor's name for tables."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from fastdit.apps.errors import UserError


def cpu_name() -> str:
    """The processor's name."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def write_block(path: Path, begin: str, end: str, text: str) -> None:
    """Replace the text between two marks in a Markdown file. Raises UserError if a mark is missing."""
    before, after = around_block(path, begin, end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def around_block(path: Path, begin: str, end: str) -> tuple[str, str]:
    """The text before the first mark and after the second. Raises UserError if a mark is missing."""
    try:
        old = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    before, found, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{path} has no {begin} … {end}: put these two lines where the table is to be")
    return before, after
