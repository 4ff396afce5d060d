"""Files of prompts: plain text (a prompt a line), csv, jsonl, yaml, or standard input.

What is not a prompt though it stands in a line is an error of that line, and is not drawn.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from fastdit.apps.errors import UserError
from fastdit.apps.render.paths import local
from fastdit.apps.render.text import blank, control, decode

JSON = re.compile(r'[\[{][\[{\s]*(?:["\]}]|$)')
"""How an object or a list begins, and no prompt: not the {a|b} or [a:b] of other programs."""
OPTIONS = re.compile(r"--[a-z]|negative prompt:|steps: \d+, sampler:", re.IGNORECASE)
"""How lines of AUTOMATIC1111's web UI begin that say settings: its files of prompts, and what it writes below a picture."""
YAML_BREAKS = str.maketrans("\x85\u2028\u2029", "   ")
"""To YAML 1.1 these end a line, to 1.2 and to editors they do not; a line's end inside of a prompt is a space there."""


def read(source: str, stream: Any = None) -> list[tuple[str, Any]]:
    """(where, what it says) of every line of a file, or of standard input if it is "-" (text, or JSON in braces).

    Raises UserError for a file that cannot be read as a whole.
    """
    path = local(source)
    said = "standard input" if source == "-" else source
    try:
        # the bytes: what standard input takes them for depends on the machine
        content = getattr(stream, "buffer", stream).read() if source == "-" and stream else path.read_bytes()
        text = decode(content.encode() if isinstance(content, str) else content)
    except (OSError, UnicodeError) as error:
        cause = getattr(error, "strerror", None) or "not UTF-8: save it as UTF-8"
        raise UserError(f"--prompts: cannot read {said} ({cause})", 2) from None
    readers = {".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".yaml": _yaml, ".yml": _yaml, ".txt": _text, "": _text}
    if source == "-":
        first = next((line for _, line in _lines("", text)), "")
        lines = list(_jsonl("line", text) if JSON.match(first) else _text("line", text))
    elif path.suffix.lower() not in readers:
        raise UserError(f"--prompts: {path.name} is neither txt, csv, jsonl nor yaml", 2)
    else:
        name = path.name.encode(errors="replace").decode()  # it goes into the manifest, which is UTF-8
        lines = list(readers[path.suffix.lower()](f"{name} line", text))
    if not lines:
        raise UserError(f"--prompts: {said} is empty", 2)
    return lines


def _lines(where: str, text: str) -> Iterator[tuple[str, str]]:
    """Stripped; empty lines, and such as begin with #, say nothing."""
    for number, line in enumerate(text.split("\n"), 1):
        if not blank(line) and not line.lstrip().startswith("#"):
            yield f"{where} {number}", line.strip()


def _text(where: str, text: str) -> Iterator[tuple[str, Any]]:
    """A prompt a line."""
    for place, line in _lines(where, text):
        if JSON.match(line):
            yield place, UserError("JSON in a file of text: write it into a .jsonl")
        elif OPTIONS.match(line):
            yield place, UserError('settings in a line of text: write a .jsonl, such as {"prompt": "a star", "steps": 20}')
        else:
            yield place, _odd(line) or line


def _odd(said: str) -> UserError | None:
    """Raw in a file, where JSON and YAML have them escaped, control characters say that it is something else than text."""
    odd = control(said)
    return None if odd is None else UserError(f"{odd!r} in a line, which is no text: save it as UTF-8, or leave that out")


def _jsonl(where: str, text: str) -> Iterator[tuple[str, Any]]:
    for place, line in _lines(where, text):
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield place, UserError(f"not JSON ({error})")


def _csv(where: str, text: str) -> Iterator[tuple[str, Any]]:
    rows = csv.DictReader(io.StringIO(text), strict=True)
    if "prompt" not in (rows.fieldnames or ()):
        raise UserError("--prompts: the first line of a csv names its columns, one of them `prompt`", 2)
    try:
        for row in rows:
            extra = row.pop(None, None)
            odd = UserError("more cells than columns") if extra else _odd("".join(cell or "" for cell in row.values()))
            yield f"{where} {rows.line_num}", odd or row
    except csv.Error as error:
        yield f"{where} {rows.line_num}", UserError(f"not csv ({error}): what follows was not read")


def _yaml(where: str, text: str) -> Iterator[tuple[str, Any]]:
    text = text.translate(YAML_BREAKS)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.SequenceNode):
            raise UserError("--prompts: a yaml file must be a list, of prompts or of mappings", 2)
        for each, said in zip(node.value, yaml.safe_load(text), strict=True):
            yield f"{where} {each.start_mark.line + 1}", said
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-13-45
        raise UserError(f"--prompts: not yaml ({' '.join(str(error).split())[:200]})", 2) from None
