"""`fastdit models`: the denoiser classes that fastdit knows, and what it does with each; docs/families.md is made of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdit.apps.bench.presets import write_block

BEGIN, END = "<!-- families -->", "<!-- /families -->"


@dataclass(frozen=True)
class Row:
    """text: where it sits; mask: what becomes of one; left: what stays dense, or why nothing is `helped`."""

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
