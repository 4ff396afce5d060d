"""The oldest diffusers and transformers of pyproject.toml: an environment of them is made, and the seam's tests run in it."""

import re
import subprocess
import sys
import tomllib

import pytest
import torch
from util import ROOT, environment

TESTS = (
    "pipelines/test_families.py",
    "attach/test_interplay.py",
    "pipelines/test_pipelines.py",
    "test_api.py",
    "attach/test_processor.py",
)


def bounds() -> list[str]:
    """`diffusers==…` and `transformers==…` at the lower bounds of the dependencies."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return [re.sub(">=", "==", one) for one in wanted if one.startswith(("diffusers", "transformers"))]


@pytest.mark.slow  # fetches some 300 MB (PyTorch aside) and runs for a quarter of an hour
def test_oldest_diffusers(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    # PyTorch is this environment's: only its version is asked for, so that no other is fetched
    packages = [f"torch=={torch.__version__.partition('+')[0]}", *bounds(), "accelerate", "peft", "pytest", "typer", "imageio"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, timeout=1800)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", ROOT], check=True, timeout=300)
    found = subprocess.run(
        [python, "-c", "import diffusers, transformers; print(diffusers.__version__, transformers.__version__)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert [version.partition("==")[2] for version in bounds()] == found
    run = subprocess.run(
        [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(ROOT / "tests" / name for name in TESTS)],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=7200,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
