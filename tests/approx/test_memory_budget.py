"""Free memory: caches of files count as free, limits of control groups (version 1 and 2, of any group above) as the end."""

import psutil
import pytest
import torch

from fastdit.approx import memory_budget

GB = 1 << 30
CPU = torch.device("cpu")


def tree(root, files):
    """Control groups: {folder: (limit, used, cached)}, and what /proc/self/cgroup says."""
    for folder, (version, limit, used, cached) in files.items():
        names = memory_budget.FILES[version == 1]
        group = root / names[0] / folder
        group.mkdir(parents=True, exist_ok=True)
        (group / names[1]).write_text(f"{limit}\n")
        (group / names[2]).write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 17\n{names[3]} {cached}\n")


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("0::/a/b", {"a/b": (2, 8 * GB, 3 * GB, GB)}, [6 * GB]),
        ("0::/a/b", {"a/b": (2, "max", 3 * GB, 0), "a": (2, 4 * GB, 3 * GB, 0)}, [GB]),
        ("0::/a/b", {"a/b": (2, "max", 3 * GB, 0)}, []),
        ("0::/host/path", {"": (2, 8 * GB, 7 * GB, 0)}, [GB]),
        ("4:cpu:/a\n3:hugetlb,memory:/a\n0::/", {"a": (1, 8 * GB, 9 * GB, 2 * GB)}, [GB]),
        ("4:cpu:/a\n1:name=systemd:/a", {"a": (1, 8 * GB, 9 * GB, 2 * GB)}, []),
    ],
    ids=["its own", "one above", "no limit", "a container's root", "version 1", "another controller"],
)
def test_limits_of_control_groups(tmp_path, own, files, left):
    (tmp_path / "own").write_text(own + "\n")
    tree(tmp_path, files)
    assert list(memory_budget._within_limits(tmp_path, tmp_path / "own")) == left


def test_no_control_groups(tmp_path):
    assert list(memory_budget._within_limits(tmp_path, tmp_path / "nothing")) == []


def test_free_memory_of_the_host(monkeypatch):
    """What the system calls available, which has the caches of files in it, and never more than a limit leaves."""
    assert 0 <= memory_budget.free_bytes(CPU) <= 1.1 * psutil.virtual_memory().available
    limits = list(memory_budget._within_limits())
    if not limits or min(limits) > psutil.virtual_memory().total:
        assert memory_budget.free_bytes(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    for limit, free in ((GB >> 4, GB >> 4), (-GB, 0)):
        monkeypatch.setattr(memory_budget, "_within_limits", lambda: [limit])  # noqa: B023
        assert memory_budget.free_bytes(CPU) == free
