"""Paths and ids as people write them: of models, LoRAs and pictures."""

from __future__ import annotations

import hashlib
import math
import os
import re
from functools import lru_cache
from pathlib import Path

from fastdit.apps.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def local(path: str) -> Path:
    """~ is home, as in the shell; of a user who is none it is a name like any other."""
    return Path(os.path.expanduser(path))


def here(path: str) -> bool:
    """Whether that is a file or folder; a path that cannot be one (too long) is none."""
    return os.path.exists(local(path))


def hub_id(said: str) -> bool:
    """Whether it can be an id of the Hub, owner/name."""
    return bool(HUB_ID.fullmatch(said)) and not said.startswith(".")


def split_lora(said: str) -> tuple[str, str]:
    """PATH@SCALE or PATH -> where it is, and its scale as it was written.

    What is a file or folder by its whole name is that, whatever is in the name; elsewhere a number behind the last @ is the
    scale, and anything else there is part of the path.
    """
    path, _, scale = said.rpartition("@")
    return (path, scale) if path and _finite(scale) and not here(said) else (said, "1")


def _finite(said: str) -> bool:
    try:
        return math.isfinite(float(said))
    except ValueError:
        return False


def content(path: str) -> str:
    """Digest of a file's content, or the path as it is where that is no file here: a folder, an id of the Hub.

    Raises UserError for a file that cannot be read.
    """
    try:
        file = local(path)
        if not os.path.isfile(file):
            return path
        found = file.stat()
        return _sha256(str(file), found.st_mtime_ns, found.st_size)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})", 2) from None


@lru_cache(maxsize=4096)
def _sha256(path: str, modified: int, size: int) -> str:
    """Read once as long as time and size are the same, however many jobs have the file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
