"""Read files of prompts: plain text with a prompt on each line, csv, jsonl, yaml, or standard input.

A line that holds something other than a prompt becomes an error and is not rendered.
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
"""The beginning of a JSON object or list. The {a|b} and [a:b] in prompts for other programs do not match."""
OPTIONS = re.compile(r"--[a-z]|negative prompt:|steps: \d+, sampler:", re.IGNORECASE)
"""The beginning of lines with settings of AUTOMATIC1111's web UI, in its files of prompts and below its pictures."""
YAML_BREAKS = str.maketrans("\x85\u2028\u2029", "   ")
"""These end a line in YAML 1.1, but not in YAML 1.2 or in editors. Inside a prompt they become spaces."""


def read(source: str, stream: Any = None) -> list[tuple[str, Any]]:
    """The lines (where, content) of a file, or of standard input if the source is "-" (text, or JSON lines).

    Raises UserError for a file that cannot be read at all.
    """
    path = local(source)
    said = "standard input" if source == "-" else source
    try:
        # read bytes: the encoding of standard input depends on the machine
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
        name = path.name.encode(errors="replace").decode()  # the name goes into the manifest, which is UTF-8
        lines = list(readers[path.suffix.lower()](f"{name} line", text))
    if not lines:
        raise UserError(f"--prompts: {said} is empty", 2)
    return lines


def _lines(where: str, text: str) -> Iterator[tuple[str, str]]:
    """Lines stripped of spaces; empty ones and comments, which begin with #, are skipped."""
    for number, line in enumerate(text.split("\n"), 1):
        if not blank(line) and not line.lstrip().startswith("#"):
            yield f"{where} {number}", line.strip()


def _text(where: str, text: str) -> Iterator[tuple[str, Any]]:
    """One prompt on each line."""
    for place, line in _lines(where, text):
        if JSON.match(line):
            yield place, UserError("JSON in a file of text: write it into a .jsonl")
        elif OPTIONS.match(line):
            yield place, UserError('settings in a line of text: write a .jsonl, such as {"prompt": "a star", "steps": 20}')
        else:
            yield place, _odd(line) or line


def _odd(said: str) -> UserError | None:
    """An error if a line has raw control characters, which text does not have; JSON and YAML escape them."""
    odd = control(said)
    return None if odd is None else UserError(f"{odd!r} in a line, so it is not text: save it as UTF-8, or remove that")


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
