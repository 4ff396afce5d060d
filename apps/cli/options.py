"""Options of commands that are made from the table of settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any

import typer

from fastdit.apps.render.settings import DEFAULTS, KINDS, SETTINGS


def names(name: str) -> list[str]:
    """The ways to write the option of a setting: our name, diffusers' name, and its letter."""
    about = SETTINGS[name]
    words = [f"--{word.replace('_', '-')}" for word in (name, about.alias) if word]
    return words + ([f"-{about.short}"] if about.short else [])


def with_settings(command: Callable[..., int], without: Collection[str] = ()) -> Callable[..., int]:
    """Replace the **settings of a command by an option for each setting except the prompt and those `without`. None means: not
    given.

    They come before the command's own keyword-only parameters, in the order of the table.
    """
    signature = inspect.signature(command, eval_str=True)
    made = []
    for name, about in SETTINGS.items():
        if name != "prompt" and name not in without:
            kind: Any = KINDS[name] | None if about.own else KINDS[name]
            default = None if about.own else DEFAULTS[name]
            option = typer.Option(*names(name), help=about.help)
            if name == "preset":  # None, to tell whether it was given beside --config
                kind, default, option.show_default = kind | None, None, DEFAULTS[name]
            annotation = Annotated[kind, option]
            made.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    given = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    first = [each for each in given if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    parameters = [*first, *made, *given[len(first) :]]
    changed: Any = command
    changed.__signature__ = signature.replace(parameters=parameters)
    changed.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": signature.return_annotation}
    return command
