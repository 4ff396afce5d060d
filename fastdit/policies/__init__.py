"""Where attention is exact: one file per published pattern, each a frozen dataclass with `select`."""

from __future__ import annotations

from typing import Any

from fastdit.policies.antidiagonal import Antidiagonal
from fastdit.policies.base import Policy
from fastdit.policies.compose import HeadProfile, Intersect, Union
from fastdit.policies.dense import Dense
from fastdit.policies.lsh import LSH
from fastdit.policies.power_of_two import PowerOfTwo
from fastdit.policies.radial import Radial
from fastdit.policies.spatial_temporal import SpatialTemporal
from fastdit.policies.stripe import Stripe
from fastdit.policies.top_mass import TopMass
from fastdit.policies.window import Window

_ALL: tuple[type[Policy], ...] = (
    Dense, Window, Radial, SpatialTemporal, Antidiagonal, TopMass, Stripe, PowerOfTwo, LSH, HeadProfile, Union, Intersect
)  # fmt: skip
POLICIES: dict[str, type[Policy]] = {cls.name: cls for cls in _ALL}

__all__ = ["POLICIES", "Policy", "policy_from_dict", *(cls.__name__ for cls in _ALL)]


def policy_from_dict(fields: dict[str, Any]) -> Policy:
    """The policy of {"name": "window", …}. Raises ValueError for an unknown name or field."""
    if not isinstance(fields, dict):
        raise ValueError(f"a policy must be a table with a name, such as {{name: window, density: 0.25}}, got {fields!r}")
    arguments = dict(fields)
    name = arguments.pop("name", None)
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}: choose one of {', '.join(sorted(POLICIES))}")
    if "policies" in arguments:
        arguments["policies"] = tuple(policy_from_dict(policy) for policy in arguments["policies"])
    try:
        return POLICIES[name](**{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()})
    except TypeError as error:
        raise ValueError(f"policy {name}: {error}") from None
