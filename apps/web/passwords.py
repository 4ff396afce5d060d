"""The file of `--auth`: names with passwords or their scrypt hashes, and the check that slows down guessing."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import re
from collections import defaultdict
from pathlib import Path

from fastdit.apps.errors import UserError
from fastdit.apps.render.text import decode

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
HASH = re.compile(r"scrypt\$(\d{1,2})\$(\d{1,2})\$(\d{1,2})\$([A-Za-z0-9+/=]{16,})\$([A-Za-z0-9+/=]{43,})")
COST, BLOCK, PARALLEL = 15, 8, 1
"""scrypt's N = 2^COST, r and p, as RFC 7914 and OWASP have them: 32 MB and about a tenth of a second."""
MOST_MEMORY = 64 << 20
PAUSE = 1.0
"""Seconds of delay after a wrong password. Attempts for one name wait for each other, so parallel guessing is no faster."""


def hashed(password: str) -> str:
    """scrypt$log2 N$r$p$salt$key, with salt and key in base64. Two calls give different salts."""
    salt = os.urandom(16)
    key = _key(password, salt, COST, BLOCK, PARALLEL)
    return f"scrypt${COST}${BLOCK}${PARALLEL}${base64.b64encode(salt).decode()}${base64.b64encode(key).decode()}"


def matches(password: str, stored: str) -> bool:
    """Whether a password has this hash. Raises ValueError for what `hashed` did not make."""
    found = HASH.fullmatch(stored)
    if found is None:
        raise ValueError("not a hash of fastdit web --hash")
    cost, block, parallel = map(int, found.groups()[:3])
    salt, key = (base64.b64decode(part, validate=True) for part in found.groups()[3:])
    return hmac.compare_digest(_key(password, salt, cost, block, parallel), key)


def _key(password: str, salt: bytes, cost: int, block: int, parallel: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=1 << cost, r=block, p=parallel, maxmem=MOST_MEMORY, dklen=32)


class PasswordGate:
    """Checks passwords, and slows down guessing. users: {name: hash}."""

    def __init__(self, users: dict[str, str]) -> None:
        self.users = users
        self.nobody = hashed(os.urandom(16).hex())
        self.turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def opens(self, name: str, password: str) -> bool:
        """Whether the password is right. Gradio awaits this in the server's event loop, so it must not block there."""
        async with self.turns[name if name in self.users else ""]:  # unknown names share one lock, and take no memory
            # an unknown name takes as long as a known one
            right = await asyncio.to_thread(matches, password, self.users.get(name, self.nobody)) and name in self.users
            if not right:
                await asyncio.sleep(PAUSE)
            return right


def read_users(path: Path) -> dict[str, str]:
    """Read {name: hash} from lines of name:hash or name:password. Raises UserError, whose message never has a password."""
    try:
        lines = [line.strip() for line in decode(path.read_bytes()).split("\n")]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--auth: cannot read {path} ({getattr(error, 'strerror', None) or 'not UTF-8'})", 2) from None
    users: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        name, colon, password = line.partition(":")
        if not colon or not password or not NAME.fullmatch(name):
            raise UserError(f"--auth: line {number} of {path.name} is not name:password (letters, digits, - and _)", 2)
        if password.startswith("scrypt$"):
            try:
                matches("", password)
            except ValueError:
                raise UserError(
                    f"--auth: the hash in line {number} of {path.name} is damaged: make it with --hash", 2
                ) from None
        users[name] = password if password.startswith("scrypt$") else hashed(password)
    if not users:
        raise UserError(f"--auth: {path} lists no user", 2)
    return users
