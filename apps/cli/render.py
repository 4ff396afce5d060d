"""The command `fastdit render`: its options, what it prints, and who renders."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdit.apps.cli.options import with_settings
from fastdit.apps.errors import UserError
from fastdit.apps.render import forecast, index, jobs
from fastdit.apps.render.config_file import read_config
from fastdit.apps.render.settings import SETTINGS, Settings

Text = str | None
Whole = int | None


@with_settings
def render(
    prompt: Annotated[Text, typer.Argument(help=SETTINGS["prompt"].help)] = None,
    prompts: Annotated[
        Text,
        typer.Option(help="File of prompts: txt, csv, jsonl, yaml, - for standard input. A line may override settings."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files; created if missing.")] = Path("."),
    name: Annotated[
        str, typer.Option(help="Names of files: {index} {slug} {seed} {hash} {preset} {steps} {frames} {height} {width}.")
    ] = jobs.NAME,
    *,
    config: Annotated[
        Path | None, typer.Option(help="File of a fastdit.Config (toml, yaml, json), which replaces the preset.")
    ] = None,
    repeat: Annotated[int, typer.Option(help="Clips of each prompt, with successive seeds.")] = 1,
    compare: Annotated[bool, typer.Option("--compare", help="Also render densely from the same seed, and compare.")] = False,
    repeats: Annotated[int, typer.Option(help="With --compare: runs of each, interleaved; the best counts.")] = 2,
    gpus: Annotated[Whole, typer.Option(help="GPUs of this machine to render on, with one process each.")] = None,
    workers: Annotated[Whole, typer.Option(help="Processes on the CPU, which share its cores.")] = None,
    threads: Annotated[Whole, typer.Option(help="Threads of PyTorch in each process.")] = None,
    cluster: Annotated[Text, typer.Option(help="Render on Ray: auto, local, ray://HOST:PORT. Paths must exist there.")] = None,
    resume: Annotated[bool, typer.Option(help="Skip the clips that the folder's manifest lists as done.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Render again, and replace files of the same name.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be rendered and what each preset would take; load nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each clip, and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    **settings: Any,
) -> int:
    """Render clips from prompts.

    Each is a video, a JSON file and a contact sheet. The folder keeps a manifest: an interrupted command goes on when it is run
    again.
    """
    if config is not None and settings["preset"] is not None:
        raise UserError("--config replaces the preset: give --config or --preset, not both", 2)
    base: dict[str, Any] = settings | {"custom": None if config is None else read_config(config)}
    base = {key: value for key, value in base.items() if value is not None}
    if (prompt is None) == (prompts is None):
        both = "" if prompt is None else ", not both"
        raise UserError(f"say what to draw: a prompt, or --prompts FILE{both}", 2)
    Settings(**{"prompt": "x"} | base).check()
    if compare and repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {repeats}", 2)
    ulysses, ring = base["ulysses"], base["ring"]
    shared = ulysses * ring > 1
    if shared and (gpus or workers or cluster or compare):
        raise UserError("--ulysses and --ring do not go with --gpus, --workers, --cluster or --compare", 2)
    if shared and not dry_run:
        from fastdit.apps.workers import context_parallel

        if context_parallel.join(ulysses, ring):
            return context_parallel.follow()
    lines = [("the command line", prompt)] if prompts is None else jobs.read(prompts, sys.stdin)
    batch = jobs.make(lines, base, name, repeat, repeats if compare else 0)
    if prompts is None and batch.errors:
        raise UserError(batch.errors[0][1], 2)
    if dry_run:
        return _dry_run(batch, as_json)
    show = not (quiet or as_json)
    pool = choose_pool(len(batch.jobs), gpus, workers, threads, cluster, show)
    if shared:
        pool = functools.partial(context_parallel.lead, show=show)
    console = Console(quiet, as_json, single=len(lines) * repeat == 1, out=out)
    for where, why in batch.errors:
        print(f"fastdit: {where}: {why}", file=sys.stderr)
    return _run(batch, out, pool, console, again=overwrite or not resume, overwrite=overwrite)


def _run(batch: Any, out: Path, pool: Any, console: Console, again: bool, overwrite: bool) -> int:
    from fastdit.apps.render import batch as runner

    with runner.Stop() as stop:
        try:
            summary = runner.run(batch.jobs, out, pool, console, stop, again, overwrite)
        finally:
            console.close()
    summary.failed = batch.errors + summary.failed
    if console.single:
        for record in summary.skipped:
            raise UserError(f"{out / record['file']} exists already, made with these settings (--overwrite makes it again)", 0)
    else:
        index.write(out)
        if not console.as_json and not console.quiet:
            typer.echo(summary)
    if stop():
        raise KeyboardInterrupt
    return 1 if summary.failed else 0


def _dry_run(batch: Any, as_json: bool) -> int:
    for job in batch.jobs:
        settings = job.settings()
        if as_json:
            typer.echo(json.dumps({"job": job.hash, "name": job.name, "where": job.where, "settings": settings.to_dict()}))
        else:
            typer.echo(f"{job.name}  seed {settings.seed}  {settings.to_dict()['preset']}  {settings.prompt[:60]!r}")
    if not as_json and batch.jobs:
        for table in forecast.tables(batch.jobs):
            typer.echo(f"\n{table}")
    for where, why in batch.errors:
        print(f"fastdit: {where}: {why}", file=sys.stderr)
    return 1 if batch.errors else 0


class Console:
    """What `render` prints while it runs: a progress bar of clips, a line of JSON for each, or only errors.

    Bars are for a terminal; a log has a line for each clip of a batch.
    """

    def __init__(self, quiet: bool, as_json: bool, single: bool, out: Path) -> None:
        self.quiet, self.as_json, self.single, self.out = quiet, as_json, single, out
        self.bar: Any = None
        self.lines = not (quiet or as_json or single or sys.stderr.isatty())
        self.count = self.total = 0

    def begin(self, jobs: int) -> None:
        from tqdm import tqdm

        hidden = self.quiet or self.as_json or self.single or not jobs
        self.bar = tqdm(
            total=jobs, desc="clips", unit="clip", file=sys.stderr, disable=hidden or None
        )  # None: hidden where there is no terminal
        self.total = jobs

    def done(self, record: dict[str, Any], text: str) -> None:
        self.bar.update()
        self.count += 1
        if self.lines:
            seconds = sum(record["seconds"].values())
            print(f"fastdit: {self.count} of {self.total}: {record['file']}, {seconds:.1f} s", file=sys.stderr)
        if self.as_json:
            typer.echo(json.dumps(record))
        elif self.single and not self.quiet:
            typer.echo(text)
            for name in (f"{record['name']}.json", *record["files"]):
                typer.echo(self.out / name)

    def failed(self, record: dict[str, Any]) -> None:
        self.bar.update()
        self.count += 1
        if self.as_json:
            typer.echo(json.dumps(record))
        self.bar.write(f"fastdit: {record['where']}: {record['error']}", file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def choose_pool(
    jobs: int, gpus: int | None, workers: int | None, threads: int | None, cluster: str | None, show: bool
) -> Callable[[list[Any], Callable[[], bool]], Iterator[Any]]:
    """The pool that was asked for: this process, child processes, or Ray. It starts with the first job. Raises UserError."""
    for option, count in (("--gpus", gpus), ("--workers", workers), ("--threads", threads)):
        if count is not None and count < 1:
            raise UserError(f"{option} must be at least 1, got {count}", 2)
    if gpus and (workers or cluster):
        raise UserError("--gpus, or --workers, or --cluster with --workers: not both", 2)
    cores = os.cpu_count() or 1
    if gpus:
        import torch

        if gpus > torch.cuda.device_count():
            raise UserError(f"--gpus {gpus}: PyTorch sees {torch.cuda.device_count()} here")

    def pool(todo: list[Any], stop: Callable[[], bool]) -> Iterator[Any]:
        from fastdit.apps.workers import pool as pools

        if not todo:
            return iter(())
        if cluster is not None:
            from fastdit.apps.workers.ray_cluster import Actors

            return pools.elsewhere(todo, stop, Actors(cluster, threads or cores, workers))
        if gpus or workers:
            count = min(gpus or workers or 1, jobs)
            share = threads or max(1, cores // count)
            return pools.elsewhere(todo, stop, pools.Processes(count, bool(gpus), None if gpus else share))
        pools.set_threads(threads)
        return pools.here(todo, stop, show)

    return pool
