"""Start-up times in fresh processes: `python -m fastdit.apps.bench.startup`, rows for docs/results.

Each command is run once to write its bytecode, then `turns` times, all commands in turn, so that a busy moment hits them alike.
CPU seconds are of the process (user and system); wall seconds depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fastdit.apps.bench.markdown import cpu_name
from fastdit.apps.render.outputs import write_json

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import fastdit": ["-c", "import fastdit"],
    "fastdit --help": ["-m", "fastdit", "--help"],
    "fastdit --version": ["-m", "fastdit", "--version"],
    "fastdit show presets": ["-m", "fastdit", "show", "presets"],
    "fastdit rendr": ["-m", "fastdit", "rendr"],
    "fastdit render a --steps 0": ["-m", "fastdit", "render", "a", "--steps", "0"],
    "from fastdit import accelerate": ["-c", "from fastdit import accelerate"],
}


def once(arguments: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, env=environment)
    wall, then = time.perf_counter() - start, used.ru_utime + used.ru_stime
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, used.ru_utime + used.ru_stime - then


def rows(turns: int) -> list[dict[str, Any]]:
    for arguments in COMMANDS.values():
        once(arguments)
    taken = [[once(arguments) for arguments in COMMANDS.values()] for _ in range(turns)]
    found = []
    for name, times in zip(COMMANDS, zip(*taken, strict=True), strict=True):
        wall, cpu = zip(*times, strict=True)
        median = statistics.median
        found.append({"command": name, "wall_s": median(wall), "wall_worst_s": max(wall), "cpu_s": median(cpu), "turns": turns})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastdit.apps.bench.startup", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/startup.json"))
    parser.add_argument("--turns", type=int, default=9)
    given = parser.parse_args()
    found = rows(given.turns)
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": sys.version.split()[0], "load": os.getloadavg()[0]}
    write_json(given.out, {"rows": found, **machine})
    for row in found:
        print(f"{row['command']:<32}{row['wall_s']:6.2f} s wall, worst {row['wall_worst_s']:.2f}, {row['cpu_s']:5.2f} s CPU")


if __name__ == "__main__":
    main()
