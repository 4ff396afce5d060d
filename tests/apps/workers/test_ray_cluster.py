"""Ray, a real cluster of two nodes on this machine: the same clips as one process makes, also when a worker is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from util import call, command, environment, fastdit

from fastdit.apps.errors import UserError
from fastdit.apps.render.manifest import read
from fastdit.apps.workers.ray_cluster import Actors

ray = pytest.importorskip("ray", reason="the extra `cluster`")
SMALL = ["--frames", 5, "--height", 32, "--width", 32, "--steps", 2, "--threads", 1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and a worker node, a core each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


def actors(cluster: Any) -> dict[int, int]:
    """Processes that have a pipeline, and the node of each: they bear the name of the actor's class."""
    found = {}
    for index, node in enumerate(cluster.list_all_nodes()):
        for raylet in node.all_processes["raylet"]:
            tasks = Path(f"/proc/{raylet.process.pid}/task").glob("*/children")
            for child in (int(pid) for task in tasks for pid in task.read_text().split()):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended since
                    if b"Actor" in Path(f"/proc/{child}/cmdline").read_bytes():
                        found[child] = index
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux: /proc")
def test_two_nodes_and_a_worker_that_is_killed(cluster: Any, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("\n".join(f"a red circle {i}" for i in range(8)))
    one = fastdit("render", "--prompts", file, *SMALL, "-o", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    process = subprocess.Popen(
        command("render", "--prompts", file, *SMALL, "-o", tmp_path / "two", "--cluster", cluster.address),
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    limit = time.monotonic() + 600
    while len(read(tmp_path / "two")) < 2:
        assert time.monotonic() < limit
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    victim, node = next(iter(actors(cluster).items()))  # the other may still be starting
    os.kill(victim, signal.SIGKILL)
    nodes = {node}
    while process.poll() is None:
        assert time.monotonic() < limit
        nodes |= set(actors(cluster).values())
        time.sleep(0.05)
    said, errors = process.communicate()
    assert nodes == {0, 1}, "a worker on each"
    assert process.returncode == 0, errors
    assert "8 rendered" in said
    assert "died (ActorDiedError): trying again" in errors
    drawn = [{key: record["frames_sha256"] for key, record in read(tmp_path / each).items()} for each in ("one", "two")]
    assert len(drawn[0]) == 8
    assert drawn[0] == drawn[1]


def test_a_session_of_somebody_else_stays(cluster: Any) -> None:
    for ours in (False, True):
        if not ours:
            ray.init(address=cluster.address, log_to_driver=False)
        try:
            with pytest.raises(UserError, match="neither a GPU nor 9 cores"):
                Actors(cluster.address, cpus=9)
            assert ray.is_initialized() is not ours
            if not ours:
                Actors(cluster.address, cpus=1).close()
                assert ray.is_initialized()
        finally:
            ray.shutdown()


def test_no_cluster_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "render", "a", *SMALL, "-o", tmp_path / "out", "--cluster", "127.0.0.1:1") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fastdit: --cluster 127.0.0.1:1: no Ray there"), last
    assert not (tmp_path / "out").exists()
