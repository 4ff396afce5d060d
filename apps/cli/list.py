"""`fastdit show presets`, `show policies`, `show settings` and `models`: what there is to choose from.

The table of docs/cli.md is made from the settings, docs/families.md from the models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdit import PRESETS
from fastdit.apps.bench.markdown import write_block
from fastdit.apps.cli import options
from fastdit.apps.render.settings import DEFAULTS, SETTINGS
from fastdit.config import PAYS

BEGIN, END = "<!-- families -->", "<!-- /families -->"


def show_presets() -> None:
    """List the presets: where attention is exact, in which number format, at which noise level."""
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
            least = ", ".join(f"{config.least_tokens(device)} tokens on {device}" for device in PAYS)
            typer.echo(f"  below {least}, or above density {config.max_density:g}: dense")


def show_policies() -> None:
    """List the policies: where attention is exact, and the fields of each with their defaults."""
    from fastdit.policies import POLICIES

    for name, policy in POLICIES.items():
        defaults = {field.name: field.default for field in fields(policy)}
        given = ", ".join(key if value is MISSING else f"{key}={value}" for key, value in defaults.items())
        typer.echo(f"{name}({given})")
        typer.echo(f"  {about(policy)}")


def about(policy: type) -> str:
    """The first line of a policy's documentation: its module's, or its own if the module holds several."""
    several = policy.__module__.endswith("compose")
    return ((policy if several else sys.modules[policy.__module__]).__doc__ or "").split("\n")[0]


def show_settings(
    table: Annotated[Path | None, typer.Option(help="Write the table into this Markdown file instead.")] = None,
) -> None:
    """List the settings of a clip: options of `render`, and keys of a line in a file of prompts."""
    if table is not None:
        write_block(table, "<!-- settings -->", "<!-- /settings -->", settings_table())
        typer.echo(f"{table}: table written")
        return
    for name, about in SETTINGS.items():
        typer.echo(f"{'prompt' if name == 'prompt' else ', '.join(options.names(name))}")
        typer.echo(f"  {about.help}")


def settings_table() -> str:
    """Markdown: options, keys of a line, and what each setting is."""
    lines = ["| option | in a line of a file | |", "|---|---|---|"]
    for name, about in SETTINGS.items():
        said = ["PROMPT"] if name == "prompt" else options.names(name)
        keys = [key for key in (name, about.alias) if key] if about.line else []
        default = "" if about.own or name == "prompt" else f" Default: {DEFAULTS[name]}."
        cells = (", ".join(f"`{word}`" for word in words) for words in (said, keys))
        lines.append(f"| {' | '.join(cells)} | {about.help}{default} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Row:
    """A denoiser class. text: where it sits; mask: how one is handled; left: what stays dense, or why nothing helps."""

    cls: str
    text: str
    mask: str
    left: str
    helped: bool = True


def rows() -> Iterator[Row]:
    from fastdit.pipelines.registry import ADAPTERS, HOPELESS

    for cls, family in ADAPTERS.items():
        facts: Any = family
        left = "; ".join(dict.fromkeys(facts.skips.values())) or "nothing"
        yield Row(cls, facts.text, facts.mask, left)
    for cls, why in HOPELESS.items():
        yield Row(cls, "", "", why, helped=False)


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    table: Annotated[Path | None, typer.Option(help="Write the table into this Markdown file instead.")] = None,
) -> None:
    """List the models that fastdit knows.

    Where their text sits in the sequence, what happens to masks, and which attention is left dense.
    """
    found = list(rows())
    if table is not None:
        write_block(table, BEGIN, END, markdown(found))
        typer.echo(f"{table}: table written")
    elif as_json:
        typer.echo(json.dumps([vars(row) for row in found], indent=2))
    else:
        width = max(len(row.cls) for row in found)
        typer.echo(f"{'denoiser'.ljust(width)}  {'text'.ljust(24)}  left dense")
        for row in found:
            typer.echo(f"{row.cls.ljust(width)}  {(row.text or '-').ljust(24)}  {row.left}")


def markdown(found: list[Row]) -> str:
    lines = ["| denoiser | text | mask | left dense |", "|---|---|---|---|"]
    lines += [f"| `{row.cls}` | {row.text} | {row.mask} | {row.left} |" for row in found if row.helped]
    lines += ["", "Cannot be helped:", ""]
    return "\n".join(lines + [f"- `{row.cls}`: {row.left}" for row in found if not row.helped])
