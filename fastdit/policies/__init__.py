"""Where attention is exact: one file per published pattern, each a frozen dataclass with `select`.

The policies of the presets are imported at once and need no torch; the others when a name of theirs is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastdit.policies.base import Policy
from fastdit.policies.dense import Dense
from fastdit.policies.window import Window

if TYPE_CHECKING:
    from fastdit.policies.antidiagonal import Antidiagonal
    from fastdit.policies.compose import HeadProfile, Intersect, Union
    from fastdit.policies.lsh import LSH
    from fastdit.policies.power_of_two import PowerOfTwo
    from fastdit.policies.radial import Radial
    from fastdit.policies.spatial_temporal import SpatialTemporal
    from fastdit.policies.stripe import Stripe
    from fastdit.policies.top_mass import TopMass

    POLICIES: dict[str, type[Policy]]

__all__ = [
    "LSH",
    "POLICIES",
    "Antidiagonal",
    "Dense",
    "HeadProfile",
    "Intersect",
    "Policy",
    "PowerOfTwo",
    "Radial",
    "SpatialTemporal",
    "Stripe",
    "TopMass",
    "Union",
    "Window",
    "policy_from_dict",
]
_MODULE_OF = {
    "Dense": "dense", "Window": "window", "Radial": "radial", "SpatialTemporal": "spatial_temporal",
    "Antidiagonal": "antidiagonal", "TopMass": "top_mass", "Stripe": "stripe", "PowerOfTwo": "power_of_two", "LSH": "lsh",
    "HeadProfile": "compose", "Union": "compose", "Intersect": "compose",
}  # fmt: skip
"""The class of each policy and its file."""


def __getattr__(name: str) -> Any:
    value: Any
    if name == "POLICIES":
        classes = [_policy(cls) for cls in _MODULE_OF]
        value = {cls.name: cls for cls in classes}
    elif name in _MODULE_OF:
        value = _policy(name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    globals()[name] = value
    return value


def _policy(cls: str) -> type[Policy]:
    return getattr(import_module(f"{__name__}.{_MODULE_OF[cls]}"), cls)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def policy_from_dict(fields: dict[str, Any]) -> Policy:
    """The policy of {"name": "window", …}. Raises ValueError for an unknown name or field."""
    from fastdit.policies import POLICIES

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
