"""The package's shape: imports point down, importing it is light, names are where they belong."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "core": 0,
    "ops": 1, "kernels": 1,
    "policies": 2, "planning": 2, "approx": 2, "config": 2, "presets": 2, "schedule": 2,
    "runs": 3, "attach": 3, "encoder_reuse": 3, "reporting": 3,
    "api": 4, "pipelines": 4, "": 4,
    "apps": 5, "__main__": 5,
}  # fmt: skip
FORMER = {"quant", "layout", "facts", "reuse", "profile", "memory", "remainder", "report"}
"""Files of `fastdit/` that only give a module its former name, for scripts of users."""
FLOORS |= dict.fromkeys(FORMER, 4)
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
            module = rest[0] if rest else ""
            assert module not in FORMER or path.name == "__init__.py", f"{path.name} imports {name}, a former name"
            below = FLOORS.get(module, FLOORS[""])
            assert below <= floor, f"{path.name} (floor {floor}) imports {name} (floor {below})"
        elif package in OUTSIDE:
            assert floor >= OUTSIDE[package], f"{path.name} (floor {floor}) imports {name}"


def test_the_contributors_table_names_every_file():
    rows = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if re.match(r"\| \d ", line)]
    named = {name: int(row[2]) for row in rows for name in re.findall(r"`(\w+)(?:\.py|/)`", row.split("|")[2])}
    assert named == {name: floor for name, floor in FLOORS.items() if name and name not in FORMER}


@pytest.mark.parametrize("folder", ["kernels", "pipelines", "apps", "assets"])
def test_top_level_folders_are_no_packages(folder):
    """`kernels/__init__.py` on sys.path would hide the Hub's `kernels` package from diffusers."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_files_stay_small():
    for root in ("fastdit", "kernels", "pipelines", "apps"):
        for path in (ROOT / root).rglob("*.py"):
            limit = 400 if root == "kernels" else 300
            assert len(path.read_text().splitlines()) <= limit, path


def test_import_needs_no_optional_library():
    """torch may import triton by itself; fastdit must do without, and without everything that only its apps use."""
    absent = ("triton", "gradio", "ray", "typer", "imageio", "imageio_ffmpeg")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import fastdit; fastdit.FastAttnProcessor()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
