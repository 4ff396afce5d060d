"""One video on several GPUs: the processes that torchrun started render each job together, each a part of the sequence.

diffusers splits the denoiser (`enable_parallelism`: Ulysses, arXiv 2309.14509, exchanges heads for tokens; a ring, arXiv
2310.01889, passes keys around). The first process decides what is rendered, tells the others, and is the only one that writes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from fastdit.apps.errors import UserError
from fastdit.apps.render.jobs import Job
from fastdit.apps.render.renderer import Renderer
from fastdit.apps.workers.pool import Failure, attempt


def join(ulysses: int, ring: int) -> int:
    """Join the other processes and choose this process's GPU; returns its rank. Raises UserError."""
    count = ulysses * ring
    if int(os.environ.get("WORLD_SIZE", "1")) != count:
        raise UserError(
            f"--ulysses {ulysses} and --ring {ring} need {count} processes, here is {os.environ.get('WORLD_SIZE', '1')}: start "
            f"torchrun --nproc-per-node {count} -m fastdit render ...", 2,
        )  # fmt: skip
    local = int(os.environ["LOCAL_RANK"])
    if (there := torch.accelerator.device_count()) <= local:
        raise UserError(f"--ulysses and --ring need a GPU for every process: PyTorch sees {there} on this machine")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return dist.get_rank()


def lead(jobs: Iterable[Job], stop: Callable[[], bool], show: bool) -> Iterator[tuple[Job, Any]]:
    """The pool of the first process: render in order, together with the others. `stop` is asked between clips.

    Raises UserError after an unforeseen failure, which the others may not have had: they may be waiting in their attention.
    """
    renderer = Renderer(show)
    for job in jobs:
        if stop():
            break
        _tell(job)
        outcome = attempt(renderer, job)
        lost = isinstance(outcome, Failure) and outcome.unforeseen
        try:
            yield job, outcome
        except GeneratorExit:
            if not lost:
                _tell(None)
            raise
        if lost:
            raise UserError("the processes are out of step after this failure: run the same command again to go on")
    _tell(None)


def follow() -> int:
    """What every other process does: render the jobs that the first one sends, and keep nothing."""
    renderer = Renderer(show=False)
    while (job := _tell(None)) is not None:
        outcome = attempt(renderer, job)
        if isinstance(outcome, Failure) and outcome.unforeseen:
            print(outcome.trace or outcome.error, file=sys.stderr)
            return 1  # torchrun ends the others
    return 0


def _tell(job: Job | None) -> Job | None:
    """Send a job from the first process to all; every process gets it back."""
    said = [job]
    dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
    return said[0]
