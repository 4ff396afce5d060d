"""Workers that die while they have nothing to do: real processes, really killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fastdit.apps.render.jobs import Job
from fastdit.apps.render.renderer import Result
from fastdit.apps.workers.pool import Died, Processes, elsewhere

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
JOB = Job(0, {"prompt": "a red circle", "frames": 5, "height": 32, "width": 32, "steps": 2})


@pytest.fixture
def team() -> Iterator[Processes]:
    made = Processes(2, threads=1)
    yield made
    made.close()


def kill(team: Processes, worker: int) -> None:
    found = team.workers[worker]
    assert found is not None
    os.kill(found[0].pid, signal.SIGKILL)


def until(team: Processes) -> Any:
    """What is next told by the team."""
    limit = time.monotonic() + 120
    while not (found := team.wait()):
        assert time.monotonic() < limit
    return found


def test_a_death_without_a_job_does_not_end_the_batch(team: Processes) -> None:
    kill(team, 1)  # there is one job, and worker 0 gets it
    ((job, outcome),) = elsewhere([JOB], lambda: False, team)
    assert job is JOB
    assert isinstance(outcome, Result), outcome


def test_the_place_of_the_dead_is_filled_with_the_next_job(team: Processes) -> None:
    kill(team, 1)
    ((worker, outcome),) = until(team)
    assert worker == 1
    assert isinstance(outcome, Died)
    assert team.wait() == []  # told once, and nobody is started to wait and die again
    assert team.workers[1] is None
    team.start(1, JOB)
    ((worker, outcome),) = until(team)
    assert worker == 1
    assert isinstance(outcome, Result), outcome
