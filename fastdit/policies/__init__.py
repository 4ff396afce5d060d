"""Where attention is exact: one file per published pattern, each a frozen dataclass with `select`."""

from __future__ import annotations

from typing import Any

from fastdit.policies.base import Policy
from fastdit.policies.dense import Dense
from fastdit.policies.window import Window

POLICIES: dict[str, type] = {cls.name: cls for cls in (Dense, Window)}

__all__ = ["POLICIES", "Dense", "Policy", "Window", "policy_from_dict"]


def policy_from_dict(fields: dict[str, Any]) -> Policy:
    """{"name": "window", …} -> the policy. Raises ValueError for an unknown name or field."""
    arguments = dict(fields)
    name = arguments.pop("name", None)
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}: choose one of {', '.join(sorted(POLICIES))}")
    try:
        return POLICIES[name](**{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()})
    except TypeError as error:
        raise ValueError(f"policy {name}: {error}") from None
