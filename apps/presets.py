"""`fastdit show presets`."""

from __future__ import annotations

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
