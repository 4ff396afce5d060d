"""Training of the pipe pipeline: the same mathematics as diffusers, and runs that can be continued."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdit.apps.bench.quality import locality
from fastdit.apps.tiny import build, evaluate, model, muon, train
from fastdit.pipelines import embedded

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_training_forward_is_diffusers_own() -> None:
    pipe: Any = embedded.load()
    words = ["a red circle moving right", "a small blue star and a green box moving up on a navy background", ""]
    ids, mask = model.tokenize(pipe.tokenizer, words)
    x, t = torch.randn(3, 48, 3, 6, 4), torch.tensor([950.0, 500.0, 20.0])
    with torch.no_grad():
        states, bias = model.encode_text(pipe.text_encoder, ids, mask)
        padded, _ = pipe.encode_prompt(words, do_classifier_free_guidance=False, max_sequence_length=512)
        want = pipe.transformer(x, t, padded, return_dict=False)[0]
        got = model.forward(pipe.transformer, x, t, states, bias, model.rotary(pipe.transformer, x))
        assert (got - want).norm() < 1e-5 * want.norm()
        rough = model.forward(pipe.transformer, x, t, states, bias, model.rotary(pipe.transformer, x), torch.bfloat16)
        assert 1e-4 * want.norm() < (rough - want).norm() < 0.05 * want.norm()


def test_orthogonalize_brings_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(muon.orthogonalize(torch.randn(3, 20, 50)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def prepared(folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(embedded.PATH / "codec.safetensors", folder)
    shutil.copytree(embedded.PATH / "tokenizer", folder / "tokenizer")
    return folder


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--device cpu --layers 1 --heads 1 --ffn 64 --tokens 80 --vae-tokens 30 --early-part 0 --anneal 0"
    options += " --sizes 5x32x32:1,9x32x48:1"
    whole, parts = prepared(tmp_path / "whole"), prepared(tmp_path / "parts")
    train.main(["--out", str(whole), "--steps", "2", *options.split()])
    for _ in range(2):
        train.main(["--out", str(parts), "--steps", "1", *options.split()])
    assert "going on from" in capsys.readouterr().out
    for name in ("vae.pt", "dit.pt"):
        a, b = (torch.load(d / name, weights_only=True) for d in (whole, parts))
        assert a["step"] == b["step"] == 2
        for key in ("models", "ema"):
            for part in a[key]:
                assert all(torch.equal(t, b[key][part][n]) for n, t in a[key][part].items())
    assert type(embedded.load(parts / "pipeline")).__name__ == "WanPipeline"
    more = ["--out", str(tmp_path / "more"), "--steps", "1", *options.split(), "--only", "dit"]
    train.main([*more, "--init", str(whole / "pipeline")])
    assert (tmp_path / "more" / "pipeline" / "vae" / "config.json").is_file()
    with pytest.raises(SystemExit, match="does not fit these options"):
        train.main([*more, "--layers", "2"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "17x64"], "17x64x64:2"),
        (["--sizes", "16x64x64:1"], "4k\\+1"),
        (["--early", "17x60x64:1"], "multiples of 16"),
    ],
)
def test_bad_sizes_are_named(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        train.main(["--out", str(tmp_path / "run"), "--device", "cpu", *options])


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="codec.safetensors is missing"):
        train.main(["--out", str(tmp_path / "run"), "--device", "cpu", "--init", str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="cannot make"):
        train.main(["--out", str(tmp_path / "file" / "run"), "--device", "cpu"])
    with pytest.raises(SystemExit, match=r"model_index\.json is missing"):
        evaluate.main(["--pipeline", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"model_index\.json is missing"):
        locality.main(["--pipeline", str(tmp_path)])


def test_building_from_nothing_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"fastdit\.apps\.tiny\.train"):
        build.build(tmp_path, tmp_path / "pipeline")
