"""Passwords kept as hashes."""

from __future__ import annotations

import asyncio
import base64
import subprocess
from pathlib import Path

import pytest
from util import command, environment

from fastdit.apps.web.passwords import HASH, PasswordGate, hashed, matches, read_users


def test_a_hash_may_stand_for_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = subprocess.run(
        command("web", "--hash"), input="open sesame\nopen sesame\n", capture_output=True, text=True, env=environment()
    )
    assert asked.returncode == 0, asked.stderr
    made = asked.stdout.split()[-1]
    assert HASH.fullmatch(made)
    assert "sesame" not in asked.stdout
    users = tmp_path / "users"
    users.write_text(f"ada:{made}\n")
    assert read_users(users) == {"ada": made}
    assert hashed("open sesame") != made  # another salt
    monkeypatch.setattr("fastdit.apps.web.passwords.PAUSE", 0)
    gate = PasswordGate(read_users(users))
    tries = {("ada", "open sesame"): True, ("ada", "Open sesame"): False, ("ada", made): False, ("bob", "open sesame"): False}
    assert {each: asyncio.run(gate.opens(*each)) for each in tries} == tries


def test_scrypt_is_the_one_of_the_rfc() -> None:
    """RFC 7914 §12: P "pleaseletmein", S "SodiumChloride", N 16384, r 8, p 1; the first 32 bytes of its key."""
    key = bytes.fromhex("7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2")
    salt = base64.b64encode(b"SodiumChloride").decode()
    assert matches("pleaseletmein", f"scrypt$14$8$1${salt}${base64.b64encode(key).decode()}")
