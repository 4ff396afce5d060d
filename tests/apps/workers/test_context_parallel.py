"""One video over two processes: real torchrun, gloo instead of GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from util import call, environment, fastdit

from fastdit.apps.render.manifest import read

SIZE = ["--frames", 5, "--height", 32, "--width", 64, "--steps", 2]


def together(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program += [str(Path(__file__).parents[2] / "split_cli.py"), "render", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, timeout=900, env=environment(OMP_NUM_THREADS="1"))


def test_two_processes_draw_what_one_draws(saved_pipe: Path, tmp_path: Path) -> None:
    """A batch in which the third job is refused by both, and the fourth one comes after that."""
    lines = [
        {"prompt": "a red circle"},
        {"prompt": "a blue square", "seed": 5},
        {"prompt": "a", "num_frames": 1, "height": 48, "width": 16},
    ]
    lines.append({"prompt": "a green triangle", "width": 32})
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = ["--prompts", tmp_path / "p.jsonl", *SIZE, "-m", saved_pipe, "--format", "png", "-o"]
    one = fastdit("render", *given, tmp_path / "one", OMP_NUM_THREADS="1")
    assert "4 rendered" in one.stdout, one.stderr
    two = together(*given, tmp_path / "two", "--ulysses", 2)
    assert "3 rendered, 1 failed" in two.stdout, two.stderr
    assert "cannot be shared by 2 processes" in two.stdout
    records = list(read(tmp_path / "two").values())
    assert [record["state"] for record in records] == ["done", "done", "failed", "done"]
    assert {record["job"] for record in records} == set(read(tmp_path / "one"))
    near = fastdit("compare", tmp_path / "one", tmp_path / "two", "--json")
    rows = [json.loads(row) for row in near.stdout.splitlines()]
    assert len(rows) == 3
    assert all(row["identical"] or row["psnr_db"] > 50 for row in rows), rows  # sums in another order, 8 bits


def test_what_cannot_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["--ulysses", 2], "need 2 processes, here is 1: start torchrun --nproc-per-node 2 -m fastdit render"),
        (["--ring", 0], "--ring must be at least 1, got 0"),
        (["--ulysses", 2, "--workers", 2], "do not go with --gpus, --workers"),
        (["--ring", 2, "--compare"], "do not go with"),
    ]
    for options, said in cases:
        assert call(monkeypatch, "render", "a", *SIZE, *options, "-o", tmp_path / "out") == 2
        assert said in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 0)
    assert call(monkeypatch, "render", "a", *SIZE, "--ring", 2, "-o", tmp_path / "out") == 1
    assert "need a GPU for every process: PyTorch sees 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_heads_and_models_that_cannot_be_split(pipe: object) -> None:
    from util import tiny_flux_pipeline

    from fastdit.apps.errors import UserError
    from fastdit.apps.render.load import split

    with pytest.raises(UserError, match="--ulysses 3 must divide the 2 attention heads of WanTransformer3DModel"):
        split(pipe, 3, 1)
    flux = tiny_flux_pipeline()
    flux.transformer._cp_plan = None  # as of a model for which diffusers has no plan
    with pytest.raises(UserError, match="does not know how to split FluxTransformer2DModel"):
        split(flux, 2, 1)
