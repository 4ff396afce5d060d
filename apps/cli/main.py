"""The `fastdit` command.

Each command is a function of the command's name in one file of `apps/`; nothing heavy is imported before it runs.
A mistake that the user can correct ends in one line on standard error. Exit status: 0 done, 1 failed while running, 2 wrong
usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import io
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

import fastdit
from fastdit.apps.errors import UserError

COMMANDS = {
    "render": "cli.render",
    "web": "web.server",
    "compare": "cli.compare",
    "tune": "cli.tune",
    "doctor": "cli.doctor",
    "models": "cli.list",
    "bench": "bench.presets",
    "bench kernel": "bench.kernel",
    "bench gpu": "bench.gpu",
    "bench encoder": "bench.encoder",
    "show policy": "cli.show",
    "show presets": "cli.list",
    "show policies": "cli.list",
    "show settings": "cli.list",
    "show schedule": "cli.show",
    "show gallery": "cli.show",
}
"""Commands and their modules in `fastdit.apps`; the function has the command's name, with an underscore for a space.

A command of two words belongs to the group named by the first word, which may be a command itself.
"""

HELP = {
    "bench": "Measure the presets against dense attention.",
    "show": "Pictures and tables of policies, presets and schedules.",
}
INTERRUPTED = 130
PLAIN: dict[str, Any] = {"rich_markup_mode": None, "context_settings": {"help_option_names": ["-h", "--help"]}}

app = typer.Typer(name="fastdit", no_args_is_help=True, pretty_exceptions_enable=False, **PLAIN)


def _add_commands() -> None:
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    found: dict[str, typer.Typer] = {}
    for name, module in COMMANDS.items():
        function = getattr(import_module(f"fastdit.apps.{module}"), name.replace(" ", "_"))
        group, _, rest = name.partition(" ")
        if group not in groups:
            app.command(name)(function)
            continue
        if group not in found:
            alone = not rest  # the group is a command too
            found[group] = typer.Typer(invoke_without_command=alone, no_args_is_help=not alone, help=HELP.get(group), **PLAIN)
            app.add_typer(found[group], name=group)
            if alone:
                found[group].callback(invoke_without_command=True, help=HELP[group])(function)
        if rest:
            found[group].command(rest)(function)


_add_commands()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastdit {fastdit.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Faster video and image generation with diffusers: sparse, quantized, self-measuring attention."""


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds the stack, so that unfinished files are removed


def main() -> None:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _terminated)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as for stderr: an unprintable prompt must not end a batch
    try:
        code = app(standalone_mode=False)
    except UserError as problem:
        _fail(str(problem), problem.code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted: nothing was left half-written", INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; otherwise Python would complain again at exit
        raise SystemExit(1) from None
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 1)
    except Exception as error:
        # typer has its own copy of click since 0.20, so usage errors are recognised by their methods.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            if type(error).__name__ == "NoArgsIsHelpError":  # since click 8.2 the help is an error's message
                print(error.format_message(), file=sys.stderr)
                raise SystemExit(error.exit_code) from None
            _fail(f"{error.format_message()} (see --help)", error.exit_code)
        raise
    if code == INTERRUPTED:  # newer typers turn Ctrl-C into this; older ones, and click, into Abort
        _fail("interrupted: nothing was left half-written", INTERRUPTED)
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"fastdit: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
