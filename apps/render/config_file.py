"""Configurations as files."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import yaml

from fastdit import Config
from fastdit.apps.errors import UserError
from fastdit.apps.render.text import decode

KINDS = (".toml", ".yaml", ".yml", ".json")


def read_config(path: Path, said: str = "--config: ") -> Config:
    """Read a `Config`, or a profile that has one under "config", from a toml, yaml or json file. Raises UserError, whose
    message begins with `said`."""
    try:
        text = decode(path.read_bytes())
        if path.suffix == ".toml":
            fields = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            fields = yaml.safe_load(text)
        else:
            fields = json.loads(text)
        return Config.from_dict(fields.get("config", fields))
    except OSError as error:
        raise UserError(f"{said}cannot read {path} ({error.strerror})", 2) from None
    except Exception as error:  # errors of three parsers, and of values of wrong types
        raise UserError(f"{said}{path} is no configuration ({' '.join(str(error).split())[:200]})", 2) from None
