"""How much memory is left on a device: what statistics may be kept in, and what `fastdit doctor` shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
FILES = (("", "memory.max", "memory.current", "inactive_file"),
         ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))  # fmt: skip
"""Of version 2 and 1: folder, the limit, what is used, and what of that the kernel gives up when asked."""


def free_bytes(device: torch.device) -> int:
    """Memory that could still be had on a device. On the host that is more than what is free, as caches of files give way, and
    less where a container has a limit of its own."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, min((psutil.virtual_memory().available, *_within_limits())))


def _within_limits(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What the limits of this process's control groups leave, of its own group and of every one above it."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # no Linux
        return
    for _, controllers, path in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, *names = FILES[1] if controllers else FILES[0]
        # in a container the path is often the host's, and only the root of what is mounted is there
        inside = Path(path.lstrip("/"))
        for group in {cgroups / folder / each for each in (inside, *inside.parents)}:
            try:
                limit, used, stat = ((group / name).read_text() for name in (*names[:2], "memory.stat"))
            except OSError:
                continue
            cached = dict(line.split(maxsplit=1) for line in stat.splitlines()).get(names[2], "0")
            if limit.strip() != "max":
                yield int(limit) - int(used) + int(cached)
