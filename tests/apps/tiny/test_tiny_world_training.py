"""Training on the world: runs that can be continued, in pieces and by several processes, and what they become."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdit.apps.tiny import muon
from fastdit.apps.tiny.tokenizer import make_tokenizer, save_tokenizer
from fastdit.apps.tiny.world import build, draw, latents, store, tasks, train
from fastdit.pipelines import embedded

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = ["--device", "cpu", "--layers", "1", "--heads", "1", "--ffn", "64", "--tokens", "80", "--anneal", "0"]
SMALL += ["--early-part", "0", "--sizes", "5x32x32:1,9x32x48:1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    latents.fit(fitted=((32, 5, 12), (64, 5, 6))).save(folder / "codec.safetensors")
    save_tokenizer(make_tokenizer(["a red ball moving right", "a blue cube spinning before a wall"] * 20), folder / "tokenizer")
    return folder


def fresh(base: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("codec.safetensors", "tokenizer"):
        (folder / name).symlink_to(base / name)
    return folder


def run(task: str, out: Path, steps: int, *more: str) -> None:
    train.main([task, "--out", str(out), "--steps", str(steps), *SMALL, *more])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("task", ["dit", "vae"])
def test_a_resumed_run_repeats_an_uninterrupted_one(task: str, base: Path, tmp_path: Path) -> None:
    whole, parts = fresh(base, tmp_path / "whole"), fresh(base, tmp_path / "parts")
    run(task, whole, 2)
    run(task, parts, 1)
    run(task, parts, 1)
    a, b = (torch.load(d / f"{task}.pt", weights_only=True) for d in (whole, parts))
    assert a["step"] == b["step"] == 2
    assert same(a["models"], b["models"])
    assert same(a["ema"], b["ema"])


def test_a_light_checkpoint_comes_in_pieces_and_is_begun_from(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PIECE", 100_000)
    out = fresh(base, tmp_path / "run")
    run("dit", out, 2, "--light", str(tmp_path / "light"))
    pieces = sorted((tmp_path / "light").iterdir())
    assert len(pieces) > 10  # more than ten, so that their order matters
    assert max(p.stat().st_size for p in pieces) <= 100_000
    light, whole = store.read_light(tmp_path / "light", "dit"), torch.load(out / "dit.pt", weights_only=True)
    for part, weights in whole["models"].items():
        for name, t in weights.items():
            assert torch.allclose(light["models"][part][name], t, rtol=1e-3, atol=1e-4)
    again = fresh(base, tmp_path / "again")
    run("dit", again, 1, "--init", str(tmp_path / "light" / "dit"))
    assert torch.load(again / "dit.pt", weights_only=True)["step"] == 3
    with pytest.raises(FileNotFoundError, match=r"nothing\.0"):
        store.read_light(tmp_path, "nothing")


def test_a_student_of_one_unguided_part_has_nothing_to_learn(base: Path, tmp_path: Path) -> None:
    out = fresh(base, tmp_path / "run")
    run("dit", out, 2, "--light", str(tmp_path / "light"), "--averages")
    codec, tokenizer = latents.prepare(out)
    losses = {}
    for parts, guidance in ((1, 1.0), (1, 4.0), (4, 1.0)):
        args = train.parser().parse_args(
            ["few", "--out", str(out), *SMALL, "--parts", str(parts), "--guidance", str(guidance), "--fp32"]
        )
        task = tasks.FewTask(args, codec, len(tokenizer), torch.device("cpu"))
        weights = store.read_light(tmp_path / "light", "dit")["ema"]
        gen = torch.Generator().manual_seed(1)
        for models in (task.models, task.teacher):
            for k, m in models.items():
                m.load_state_dict(weights[k])
                if k == "transformer":  # two steps leave the output near zero: make it differ by caption and level
                    torch.nn.init.normal_(m.proj_out.weight, std=0.3, generator=torch.Generator().manual_seed(3))
        size, rows, ids, mask = tasks.Batches([((5, 32, 32), 1.0)], 64, tokenizer, 0, 0, 0.0).batch(0)
        losses[parts, guidance] = float(task.loss(0, size, rows, ids, mask, gen)[0])
    assert losses[1, 1.0] < 1e-8
    assert losses[1, 4.0] > 1e-6
    assert losses[4, 1.0] > 1e-6


def test_two_processes_learn_from_different_clips_and_stay_alike(base: Path, tmp_path: Path) -> None:
    codec, tokenizer = latents.prepare(base)
    del codec
    one, two = (tasks.Batches([((5, 32, 32), 1.0)], 64, tokenizer, 0, 0, 0.1, rank).batch(3) for rank in (0, 1))
    assert one[0] == two[0]
    assert not torch.equal(one[1], two[1])
    out = fresh(base, tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastdit.apps.tiny.world.train"]
    done = subprocess.run(
        [*command, "dit", "--out", str(out), "--steps", "2", *SMALL], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone = fresh(base, tmp_path / "alone")
    run("dit", alone, 2)
    a, b = (torch.load(d / "dit.pt", weights_only=True) for d in (out, alone))
    assert a["step"] == 2
    assert not same(a["models"], b["models"])  # the other process's clips had a say


def test_the_pipeline_draws_what_the_checkpoint_draws(base: Path, tmp_path: Path) -> None:
    out = fresh(base, tmp_path / "run")
    for task in ("dit", "vae"):
        run(task, out, 1, "--light", str(tmp_path / "light"))
    where = ["--vae", str(tmp_path / "light" / "vae"), "--base", str(out)]
    build.main([str(tmp_path / "light" / "dit"), *where, "--out", str(tmp_path / "pipeline")])
    pipe: Any = embedded.load(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "WanPipeline"
    painter = draw.load(tmp_path / "light" / "dit", out, torch.device("cpu"))
    for steps, guidance in ((8, 1.0), (5, 3.0)):
        want = painter.latents(["a red ball"], (5, 32, 32), steps, guidance, 5.0, seed=4)
        got = pipe(
            "a red ball", num_frames=5, height=32, width=32, num_inference_steps=steps, guidance_scale=guidance,
            generator=torch.Generator().manual_seed(4), output_type="latent",
        ).frames  # fmt: skip
        assert (got - want).norm() < 0.05 * want.norm()


def test_levels_of_noise_reach_zero_in_the_last_step() -> None:
    levels = draw.sigmas(8, 5.0)
    assert len(levels) == 9
    assert (levels[0], levels[-1]) == (1, 0)
    assert (levels.diff() < 0).all()


def test_orthogonalize_brings_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(muon.orthogonalize(torch.randn(3, 20, 50)))
    assert values.min() > 0.5
    assert values.max() < 1.3
