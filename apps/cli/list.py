"""`fastdit show presets` and `fastdit show policies`."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields

import typer


def show_presets() -> None:
    """List the presets: where attention is exact, in which number format, at which noise level."""
    from fastdit import PRESETS

    for name, config in PRESETS.items():
        typer.echo(name)
        if not config.phases:
            typer.echo("  every noise level: dense")
        for phase in config.phases:
            quant = "" if phase.quant.is_none else f", {phase.quant}"
            rest = "" if phase.remainder == "none" else f", {phase.remainder} remainder"
            kept = "" if phase.reuse.kind == "none" else f", {phase.reuse}"
            typer.echo(f"  noise level {phase.sigma[0]:g} … {phase.sigma[1]:g}: {phase.policy}{quant}{rest}{kept}")
        if config.phases:
            typer.echo(f"  below {config.min_tokens} tokens, or above density {config.max_density:g}: dense")


def show_policies() -> None:
    """List the policies: where attention is exact, and the fields of each with their defaults."""
    from fastdit.policies import POLICIES

    for name, policy in POLICIES.items():
        defaults = {field.name: field.default for field in fields(policy)}
        given = ", ".join(key if value is MISSING else f"{key}={value}" for key, value in defaults.items())
        typer.echo(f"{name}({given})")
        typer.echo(f"  {about(policy)}")


def about(policy: type) -> str:
    """A policy in a line: its module's, or its own where a module holds several."""
    several = policy.__module__.endswith("compose")
    return ((policy if several else sys.modules[policy.__module__]).__doc__ or "").split("\n")[0]
