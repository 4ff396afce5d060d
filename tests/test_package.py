"""The package's shape: imports point down, importing it is light, names are where they belong."""

import ast
import functools
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "core": 0,
    "ops": 1, "kernels": 1,
    "policies": 2, "planning": 2, "approx": 2, "config": 2, "presets": 2, "schedule": 2,
    "runs": 3, "attach": 3, "encoder_reuse": 3, "reporting": 3,
    "api": 4, "diffusers_hooks": 4, "pipelines": 4, "prediction": 4, "": 4,
    "apps": 5, "__main__": 5,
}  # fmt: skip
FORMER = {"quant", "layout", "facts", "reuse", "profile", "memory", "remainder", "report"}
"""Files of `fastdit/` that only give a module its former name, for scripts of users."""
FLOORS |= dict.fromkeys(FORMER, 4)
HEAVY = {
    "torch", "diffusers", "transformers", "numpy", "PIL", "gradio", "ray", "triton", "triton.experimental", "imageio",
    "imageio_ffmpeg", "torchmetrics", "torchvision", "peft", "tokenizers", "safetensors", "sageattention", "playwright",
    "uvicorn", "fastapi", "starlette", "tqdm",
}  # fmt: skip
"""Libraries that take long to import, or may be missing; triton.experimental (Gluon) is missing in some versions of Triton."""
OUTSIDE = {"diffusers": 3, "transformers": 4, "triton": 1, "gradio": 5, "typer": 5, "ray": 5}
"""The lowest floor that may know each library; triton is for the kernels alone."""


def sources():
    """Every source file, without the development links in `fastdit/`."""
    for folder in ("fastdit", "kernels", "pipelines", "apps"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).parts
            if parts[0] != "fastdit" or parts[1] not in ("kernels", "pipelines", "apps", "assets"):
                yield path, parts


def files():
    for path, parts in sources():
        name = parts[0] if parts[0] != "fastdit" else parts[1].removesuffix(".py")
        floor = 5 if name == "__init__" else FLOORS[name]  # it gives names of all floors, those of apps when they are used
        yield pytest.param(path, floor, id="/".join(parts))


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


def module_name(parts):
    inside = parts if parts[0] == "fastdit" else ("fastdit", *parts)
    return ".".join(inside).removesuffix(".py").removesuffix(".__init__")


MODULES = {module_name(parts): path for path, parts in sources()}


def for_annotations(name):
    """{name: module} of what a module imports for type checkers alone: of a package that loads late, what it exports."""
    blocks = [n for n in ast.parse(MODULES[name].read_text()).body if isinstance(n, ast.If)]
    imports = [n for block in blocks for n in block.body if isinstance(n, ast.ImportFrom)]
    return {alias.name: node.module for node in imports for alias in node.names}


LATE = {name: for_annotations(name) for name in ("fastdit", "fastdit.policies")}
"""Packages whose exports are imported when they are first used, and the module of each export."""
LATE["fastdit.policies"]["POLICIES"] = "fastdit.policies.top_mass"  # imports them all; this one stands for them


@pytest.mark.parametrize("package", LATE)
def test_late_exports_are_declared_once(package):
    """What type checkers, `dir` and `from fastdit import X` see is the same, and each name is the one of its module."""
    found = import_module(package)
    declared = LATE[package]
    assert declared.keys() <= set(found.__all__) <= set(dir(found))
    assert sorted(found.__all__) == sorted(set(found.__all__))
    for name in found.__all__:
        value = getattr(found, name)
        if name in declared and name != "POLICIES":
            assert value is getattr(import_module(declared[name]), name)
    assert not hasattr(found, "nothing")
    assert not hasattr(found, "__wrapped__")


@functools.cache
def imported(name):
    """([modules imported at the top of a module], [(line, modules) of each import in its functions]); not for annotations."""
    top, inside = [], []

    def visit(node, in_function):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in child.names]
                if isinstance(child, ast.ImportFrom):
                    late = LATE.get(child.module, {})
                    of = child.module
                    names = [full if (full := f"{of}.{each}") in MODULES else late.get(each, of) for each in names]
                inside.append((child.lineno, names)) if in_function else top.extend(names)
            visit(child, in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(ast.parse(MODULES[name].read_text()), False)
    return top, inside


def test_no_module_imports_itself_by_way_of_others():
    """Imports in functions count: they would hide a circle."""
    done = set()

    def follow(name, way):
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name in done:
            return
        top, inside = imported(name)
        for other in {*top, *(each for _, names in inside for each in names)} & MODULES.keys():
            follow(other, [*way, name])
        done.add(name)

    for name in MODULES:
        follow(name, [])


def heavy(name, seen):
    """Heavy libraries that importing a module imports; those of the package's own `__init__` aside."""
    if name not in MODULES:
        return {library for library in HEAVY if f"{name}.".startswith(f"{library}.")}
    if name in seen:
        return set()
    seen.add(name)
    return set().union(*(heavy(each, seen) for each in imported(name)[0]))


def test_imports_in_functions_spare_something():
    """An import stands at the top of its file, unless it imports a heavy library that the top does not import anyway."""
    wrong = []
    for name, path in MODULES.items():
        top, inside = imported(name)
        anyway = set().union(*(heavy(each, set()) for each in top))
        for line, names in inside:
            if not set().union(*(heavy(each, set()) for each in names)) - anyway:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: import {names[0]} at the top of the file")
    assert not wrong
