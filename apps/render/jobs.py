"""Jobs: what to render, from one prompt or from the lines of a file. Each job has a seed, a name and a hash.

A line may override settings. A wrong line becomes an error with its line number; the other lines are rendered.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fastdit.apps.errors import UserError
from fastdit.apps.render.media import digest, slug
from fastdit.apps.render.paths import content, split_lora
from fastdit.apps.render.prompts import read as read
from fastdit.apps.render.settings import ALIASES, KINDS, SETTINGS, Settings
from fastdit.apps.render.text import half_pair

NAME = "{index:04d}-{slug}-s{seed}"
IN_A_LINE = {name: KINDS[name] for name, about in SETTINGS.items() if about.line}
"""The settings that a line of a file may contain, and their types."""

MARK = "\ufeff"  # byte order mark: $(cat FILE) in a shell, spreadsheet cells and the clipboard pass it on
LONGEST_NAME = 200  # in bytes; most file systems allow 255


@dataclass(frozen=True)
class Job:
    """One clip to make.

    given: the settings that the user gave; the rest are the pipeline's own defaults. where: the line that the job comes from.
    name: of its files, without suffix. repeats: if above 0, also render densely, this many interleaved times, and compare.
    """

    index: int
    given: dict[str, Any]
    where: str = "the command line"
    name: str = ""
    repeats: int = 0

    def settings(self, **defaults: Any) -> Settings:
        return Settings(**defaults | self.given)

    @cached_property
    def hash(self) -> str:
        """Sixteen hexadecimal digits, the same for the same clip on every machine and at any time.

        The name of a preset does not count, but its configuration does; nor does the path of a file, but its content does.
        Raises UserError for a file that cannot be read.
        """
        hashed = {name for name, about in SETTINGS.items() if about.hashed}
        said = {name: value for name, value in self.given.items() if name in hashed and value is not None}
        said["config"] = self.settings().config().to_dict()
        if "image" in said:
            said["image"] = content(said["image"])
        if "lora" in said:
            path, scale = split_lora(said["lora"])
            said["lora"] = [content(path), scale]
        if self.repeats:
            said["repeats"] = self.repeats
        return digest(said, 16)


@dataclass
class Batch:
    """jobs in order; errors: (where, what is wrong) for each line that is not a job."""

    jobs: list[Job] = field(default_factory=list)
    errors: list[tuple[str, str]] = field(default_factory=list)


def make(lines: Sequence[tuple[str, Any]], base: dict[str, Any], name: str = NAME, repeat: int = 1, repeats: int = 0) -> Batch:
    """Make jobs of lines (where, content), each on top of the settings `base` and repeated with `repeat` successive seeds.

    The content of a line that could not be read is the UserError that says why.
    """
    if repeat < 1:
        raise UserError(f"--repeat must be at least 1, got {repeat}", 2)
    check_name(name)
    batch, seen = Batch(), dict[str, str]()
    for where, said in lines:
        try:
            given = base | parse(said)
            if "preset" in parse(said):
                given.pop("custom", None)
            Settings(**given).check()
            jobs = [Job(0, given | {"seed": given["seed"] + turn}, where, repeats=repeats) for turn in range(repeat)]
            if (twin := next((seen[job.hash] for job in jobs if job.hash in seen), None)) is not None:
                raise UserError(f"duplicate of {twin}: the same prompt, seed and settings")
        except UserError as error:
            batch.errors.append((where, str(error)))
            continue
        for job in jobs:
            seen[job.hash] = where
            batch.jobs.append(replace(job, index=len(batch.jobs)))
    taken = set[str]()
    for place, job in enumerate(batch.jobs):
        batch.jobs[place] = named = replace(job, name=file_stem(name, job, taken))
        taken.add(named.name)
    return batch


def parse(said: Any) -> dict[str, Any]:
    """The settings that one line gives, as a prompt or as a mapping. Raises UserError for unknown keys and wrong types."""
    if isinstance(said, UserError):
        raise said
    if isinstance(said, str):
        return {"prompt": said.lstrip(MARK)}
    if not isinstance(said, dict):
        raise UserError(f"expected a prompt or a mapping of settings, got {str(said)[:80]!r}")
    given: dict[str, Any] = {}
    for key, value in said.items():
        if value is None or value == "":
            continue  # an empty cell of a csv
        ours = ALIASES.get(key, key)
        if ours not in IN_A_LINE:
            raise UserError(f"unknown key {key!r}: known are {', '.join([*IN_A_LINE, *ALIASES])}")
        if ours in given:
            raise UserError(f"{key!r} is given twice")
        given[ours] = _as(IN_A_LINE[ours], key, value)
    if "prompt" not in given:
        raise UserError("there is no prompt")
    return given | {"prompt": given["prompt"].lstrip(MARK)}


def _as(kind: type, key: str, value: Any) -> Any:
    if kind is str:
        if isinstance(value, str):
            return value
        raise UserError(f"{key} must be text, got {value!r}")
    try:
        number = float(value)
        if isinstance(value, bool) or not math.isfinite(number):
            raise ValueError
        if kind is float:
            return number
        whole = int(value)  # of a string, int() reads integers of any length, which a float cannot hold
        if whole != number and not isinstance(value, str):
            raise ValueError
        return whole
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{key} must be a {'whole ' if kind is int else ''}number, got {str(value)[:80]!r}") from None


def check_name(template: str) -> None:
    """Raise UserError for a --name with unknown fields, or one that would leave the folder."""
    example = Job(0, {"prompt": "a", "seed": 0})
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        if unknown := [name for name in fields if name not in _fields(example)]:
            raise UserError(f"--name: unknown field {{{unknown[0]}}}: known are {', '.join(_fields(example))}", 2)
        name = template.format(**_fields(example))
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"--name {template!r} is not a name such as {NAME!r} ({error})", 2) from None
    if not name.strip() or name.startswith(".") or half_pair(name) or any(c in "/\\:\0" or ord(c) < 32 for c in name):
        raise UserError(f"--name {template!r} must be a plain file name: no / \\ : and no dot in front", 2)


def _fields(job: Job) -> dict[str, Any]:
    settings = job.settings()
    return {
        "index": job.index, "slug": slug(settings.prompt), "seed": settings.seed, "hash": job.hash,
        "preset": slug("custom" if settings.custom else settings.preset), "steps": settings.steps,
        "frames": settings.frames, "height": settings.height, "width": settings.width,
    }  # fmt: skip


def file_stem(template: str, job: Job, taken: set[str]) -> str:
    """The file name of a job, with its hash added if another job has the name already. Raises UserError if it is too long."""
    name = template.format(**_fields(job))
    if len(name.encode()) > LONGEST_NAME:
        raise UserError(f"--name {template!r} makes a name of {len(name.encode())} bytes: at most {LONGEST_NAME}", 2)
    return f"{name}-{job.hash[:8]}" if name in taken else name
