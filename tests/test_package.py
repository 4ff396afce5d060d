"""The package's shape: imports point down, importing it is light, names are where they belong."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "layout": 0, "quant": 0, "reference": 0, "blockmask": 0, "cache": 0,
    "ops": 1, "kernels": 1,
    "policies": 2, "plan": 2, "remainder": 2, "profile": 2, "config": 2, "reuse": 2, "memory": 2, "guard": 2, "trim": 2,
    "place": 2, "facts": 2, "heatmap": 2, "schedule": 2, "room": 2, "presets": 2,
    "noise": 2, "fingerprint": 2, "branches": 2, "runs": 3, "scope": 3, "graphs": 3, "seam": 3,
    "handle": 3, "observe": 3, "processor": 3, "parallel": 3, "hooked": 3, "attend": 3, "clock": 3, "report": 3,
    "propagate": 3, "replay": 3, "features": 3, "inject": 3,
    "api": 4, "pipelines": 4, "": 4,
    "apps": 5, "__main__": 5,
}  # fmt: skip
OUTSIDE = {"diffusers": 3, "transformers": 4, "triton": 1, "gradio": 5, "typer": 5, "ray": 5}
"""The lowest floor that may know each library; triton is for the kernels alone."""


def files():
    for folder in ("fastdit", "kernels", "pipelines", "apps"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).parts
            if parts[0] == "fastdit" and parts[1] in ("kernels", "pipelines", "apps", "assets"):
                continue  # the development links
            name = parts[0] if parts[0] != "fastdit" else parts[1].removesuffix(".py")
            yield pytest.param(path, FLOORS["" if name == "__init__" else name], id="/".join(parts))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(("path", "floor"), list(files()))
def test_imports_point_down(path, floor):
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "fastdit":
            below = FLOORS.get(rest[0], FLOORS[""]) if rest else FLOORS[""]
            assert below <= floor, f"{path.name} (floor {floor}) imports {name} (floor {below})"
        elif package in OUTSIDE:
            assert floor >= OUTSIDE[package], f"{path.name} (floor {floor}) imports {name}"


def test_the_contributors_table_names_every_file():
    rows = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if re.match(r"\| \d ", line)]
    named = {name: int(row[2]) for row in rows for name in re.findall(r"`(\w+)(?:\.py|/)`", row.split("|")[2])}
    assert {name: floor for name, floor in named.items() if name in FLOORS} == {
        name: floor for name, floor in FLOORS.items() if name
    }


@pytest.mark.parametrize("folder", ["kernels", "pipelines", "apps", "assets"])
def test_top_level_folders_are_no_packages(folder):
    """`kernels/__init__.py` on sys.path would hide the Hub's `kernels` package from diffusers."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_files_stay_small():
    for root in ("fastdit", "kernels", "pipelines", "apps"):
        for path in (ROOT / root).rglob("*.py"):
            limit = 400 if root == "kernels" else 250
            assert len(path.read_text().splitlines()) <= limit, path


def test_import_needs_no_optional_library():
    """torch may import triton by itself; fastdit must do without, and without everything that only its apps use."""
    absent = ("triton", "gradio", "ray", "typer", "imageio", "imageio_ffmpeg")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import fastdit; fastdit.FastAttnProcessor()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
