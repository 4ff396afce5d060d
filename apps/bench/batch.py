"""What a batch costs beside its pipeline, on the embedded model: `python -m fastdit.apps.bench.batch`, rows for docs/results.

overhead: the share of a clip's time that is not the pipeline's own call (hooks, seams, encoding, contact sheet, hashes, JSON
files, manifest, all synced to the disk), in a batch, so that loading is not in it. memory: resident size of the process over a
long batch. throughput: clips per second of two workers, of one core each, against one; starting them is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdit.apps.bench.markdown import cpu_name
from fastdit.apps.render import jobs
from fastdit.apps.render.outputs import write_json

SMALL = {"frames": 5, "height": 32, "width": 32, "steps": 2}
MIDDLE = {"frames": 17, "height": 64, "width": 64, "steps": 10}
USUAL = {"frames": 33, "height": 128, "width": 128, "steps": 20}


class Timeline:
    """For each clip: when it was done, its record, and the process's resident bytes at that time."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.records: list[dict[str, Any]] = []
        self.resident: list[int] = []

    def begin(self, jobs: int) -> None: ...

    def done(self, record: dict[str, Any], text: str) -> None:
        self.times.append(time.perf_counter())
        self.records.append(record)
        self.resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    def failed(self, record: dict[str, Any]) -> None:
        raise RuntimeError(record["error"])


def batch(count: int, pool: Callable[..., Any], **settings: Any) -> Timeline:
    """Render this many clips into a temporary folder."""
    from fastdit.apps.render import batch as runner

    made = jobs.make([(str(i), f"a red ball moving right {i}") for i in range(count)], {"seed": 0} | settings)
    timeline = Timeline()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # on a disk, not in memory as /tmp may be
        runner.run(made.jobs, Path(folder), pool, timeline, lambda: False)
    return timeline


def overhead(clips: int) -> dict[str, Any]:
    from fastdit.apps.workers import pool

    timeline = batch(clips + 1, lambda todo, stop: pool.here(todo, stop, show=False), **USUAL)
    whole = [b - a for a, b in zip(timeline.times, timeline.times[1:], strict=False)]
    seconds = [record["seconds"] for record in timeline.records[1:]]  # the first one loads the model
    called = [each["text"] + each["denoise"] + each["decode"] for each in seconds]
    shares = [1 - inside / all_of_it for inside, all_of_it in zip(called, whole, strict=True)]
    return USUAL | {
        "what": "overhead", "tokens": timeline.records[0]["tokens"], "clips": clips, "seconds_a_clip": statistics.median(whole),
        "seconds_encode": statistics.median(each["encode"] for each in seconds), "share": statistics.median(shares),
        "shares": shares,
    }  # fmt: skip


def memory(clips: int) -> dict[str, Any]:
    from fastdit.apps.workers import pool

    timeline = batch(clips, lambda todo, stop: pool.here(todo, stop, show=False), **SMALL)
    resident = [size / 2**20 for size in timeline.resident]
    ends = min(20, clips // 2)
    first, last = statistics.mean(resident[:ends]), statistics.mean(resident[-ends:])
    row = SMALL | {"what": "memory", "clips": clips, "ends": ends, "first_mb": first, "last_mb": last, "ratio": last / first}
    return row | {"every_20th_mb": resident[::20]}


def throughput(clips: int, turns: int, kind: str) -> dict[str, Any]:
    """Best of interleaved turns. The first clip of each worker does not count, since it loads the model."""
    from fastdit.apps.workers import pool
    from fastdit.apps.workers.ray_cluster import Actors

    best = {1: 0.0, 2: 0.0}
    for _ in range(turns):
        for size in best:

            def team(todo: Any, stop: Any, size: int = size) -> Any:
                workers: Any = pool.Processes(size, threads=1) if kind == "processes" else Actors("local", 1, size)
                return pool.elsewhere(todo, stop, workers)

            times = batch(clips, team, **MIDDLE).times
            rate = (clips - size) / (times[-1] - times[size - 1])
            best[size] = max(best[size], rate)
    return MIDDLE | {
        "what": "throughput", "kind": kind, "clips": clips, "turns": turns, "clips_per_s": list(best.values()),
        "ratio": best[2] / best[1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastdit.apps.bench.batch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/batch.json"))
    parser.add_argument("--only", choices=("overhead", "memory", "processes", "ray"), nargs="+")
    parser.add_argument("--clips", type=int, default=6, help="of overhead and throughput")
    parser.add_argument("--long", type=int, default=200, help="clips of the memory row")
    parser.add_argument("--turns", type=int, default=2)
    given = parser.parse_args()
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "overhead": lambda: overhead(given.clips),
        "memory": lambda: memory(given.long),
        "processes": lambda: throughput(given.clips, given.turns, "processes"),
        "ray": lambda: throughput(given.clips, given.turns, "ray"),
    }
    import torch

    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    for name in given.only or measures:
        row = {"row": name} | measures[name]() | machine | {"load": os.getloadavg()[0]}
        rows = [old for old in rows if old["row"] != name] + [row]
        write_json(given.out, {"rows": rows})
        print(json.dumps(row))


if __name__ == "__main__":
    main()
