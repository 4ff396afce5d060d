"""What options do to a loaded pipeline: tiling, compiling, LoRA; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastdit.apps.errors import UserError
from fastdit.apps.render.generate import arguments
from fastdit.apps.render.load import load
from fastdit.apps.render.settings import Settings


def settings(model: Path, **more: Any) -> Settings:
    return Settings("a red circle", model=str(model), device="cpu", **more)


def test_tiles_and_compiled_blocks(saved_pipe: Path) -> None:
    plain, changed = load(settings(saved_pipe)), load(settings(saved_pipe, vae_tiling=True, compile=True))
    assert not plain.vae.use_tiling
    assert changed.vae.use_tiling
    compiled = [[block._compiled_call_impl is not None for block in pipe.transformer.blocks] for pipe in (plain, changed)]
    assert compiled == [[False, False], [True, True]]


@pytest.mark.parametrize("offload", ["model", "group"])
def test_nothing_to_unload_without_a_gpu(offload: str, saved_pipe: Path) -> None:
    with pytest.raises(UserError, match="there is no GPU to unload") as told:
        load(settings(saved_pipe, cpu_offload=offload))
    assert told.value.code == 2


def test_lora_and_its_scale(saved_pipe: Path, tmp_path: Path) -> None:
    tmp_path = tmp_path / "styles@0.5"  # what is there by its whole name has no scale in it
    peft = pytest.importorskip("peft", reason="the extra `lora`")
    from diffusers import WanPipeline
    from peft.utils import get_peft_model_state_dict

    pipe = load(settings(saved_pipe))
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    (file,) = tmp_path.glob("*.safetensors")
    marked = file.rename(tmp_path / "style@v2.safetensors")
    for said, scale in ((marked, 1.0), (f"{marked}@0.5", 0.5), (tmp_path, 1.0), (f"{tmp_path}@0.25", 0.25)):
        layer: Any = load(settings(saved_pipe, lora=str(said))).transformer.blocks[0].attn1.to_q
        assert layer.scaling["lora"] == scale * layer.lora_alpha["lora"] / 2
        assert torch.equal(layer.lora_A["lora"].weight, pipe.transformer.blocks[0].attn1.to_q.lora_A["default"].weight)


@pytest.mark.parametrize("said", ["nowhere.safetensors", "nowhere@much", "@1"])
def test_no_such_lora(said: str, saved_pipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load the LoRA"):
        load(settings(saved_pipe, lora=str(tmp_path / said)))


@pytest.mark.parametrize(
    "said", ["styles/gone.safetensors@0.5", "gone@v2/style.safetensors", "owner/style@main", "owner/style@nan", "./gone", "@1"]
)
def test_a_lora_that_is_not_here_is_no_id(said: str, saved_pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the Hub for it."""
    monkeypatch.setattr("diffusers.WanPipeline.load_lora_weights", lambda *_, **__: pytest.fail("taken for an id of the Hub"))
    with pytest.raises(UserError, match="nor is that a Hub id") as told:
        load(settings(saved_pipe, lora=said))
    assert f"no file or folder {said.removesuffix('@0.5')}," in str(told.value)


def test_an_image_for_a_model_that_takes_none(pipe: Any, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="WanPipeline takes no image"):
        arguments(pipe, Settings("a", image=str(tmp_path / "a.png")))
