"""The `fastdit` command: `render`, `presets`, `bench`, `bench kernel`.

Each command is one file in `apps/` with a function of the command's name; nothing heavy is imported before it runs.
Whatever a user can mend ends in one line on standard error. Exit status: 0 done, 1 failed while running, 2 wrong usage,
130 interrupted, 143 terminated.
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from fastdit.apps.media import UserError

COMMANDS = {
    "render": "render",
    "bench": "bench",
    "bench kernel": "bench_kernel",
    "show policy": "show",
    "show schedule": "show",
    "show gallery": "show",
}
"""Commands and their modules in `fastdit.apps`; the function has the command's name, with an underscore for a space."""

INTERRUPTED = 130


class TwoWords(typer.core.TyperGroup):
    """Commands whose name may be two words."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        two = " ".join(args[:2])
        return (two, self.commands[two], args[2:]) if two in self.commands else super().resolve_command(ctx, args)


app = typer.Typer(
    name="fastdit",
    cls=TwoWords,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _module in COMMANDS.items():
    app.command(_name)(getattr(import_module(f"fastdit.apps.{_module}"), _name.replace(" ", "_")))


def _version(wanted: bool) -> None:
    if wanted:
        import fastdit

        typer.echo(f"fastdit {fastdit.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Faster video and image generation with diffusers: sparse, quantized, self-measuring attention."""


@app.command()
def presets() -> None:
    """List the presets: where attention is exact, in which number format, at which noise level."""
    from fastdit import PRESETS

    for name, config in PRESETS.items():
        typer.echo(name)
        if not config.phases:
            typer.echo("  every noise level: dense")
        for phase in config.phases:
            quant = "" if phase.quant.is_none else f", {phase.quant}"
            typer.echo(f"  noise level {phase.sigma[0]:g} … {phase.sigma[1]:g}: {phase.policy}{quant}")
        if config.phases:
            typer.echo(f"  below {config.min_tokens} tokens, or above density {config.max_density:g}: dense")


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds, so that unfinished files go


def main() -> None:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(standalone_mode=False)
    except UserError as problem:
        _fail(str(problem), problem.code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted: nothing was left half-written", INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; Python would say so once more at exit
        raise SystemExit(1) from None
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 1)
    except Exception as error:
        # typer carries its own copy of click from 0.20 on: its usage errors are known by what they can do.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            _fail(f"{error.format_message()} (see --help)", error.exit_code)
        raise
    if code == INTERRUPTED:  # newer typers turn Ctrl-C into this; older ones, and click, into Abort
        _fail("interrupted: nothing was left half-written", INTERRUPTED)
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"fastdit: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
