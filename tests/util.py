"""Shared by tests: a small real pipeline with random weights, the command line as a subprocess, reading of mp4s."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
"""The repository."""
DOCS = ROOT / "docs"
WORDS = ["a", "red", "green", "blue", "circle", "square", "triangle", "moving", "left", "right", "up", "down", "and"]


def word_tokenizer() -> Any:
    """One token a word, `</s>` at the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tiny_flux_pipeline() -> Any:
    """A FluxPipeline of real classes; height and width must be multiples of 16 at its autoencoder's scale of 8."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.05)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=0, max_position_embeddings=77,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4, norm_num_groups=4, shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    short = word_tokenizer()
    short.model_max_length = 77
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae,
        CLIPTextModel(clip).eval(),
        short,
        T5EncoderModel(t5).eval(),
        tokenizer,
        transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_wan_pipeline(**denoiser: Any) -> Any:
    """A WanPipeline of real classes: 2 layers, 2 heads of 64, patch (1, 2, 2), 8× smaller in space and 4× in time.

    So height and width must be multiples of 16. proj_out is drawn too: it starts at zero, and nothing would be seen.
    """
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    text = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    sizes: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "rope_max_seq_len": 128,
    }
    transformer = WanTransformer3DModel(**sizes | denoiser).eval()
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.05)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def render(pipe: Any, prompt: str = "a b c", seed: int = 0, steps: int = 6, size: int = 64, **more: Any) -> Any:
    """Latents that `tiny_wan_pipeline` makes: 3×4×4 tokens for the denoiser at this size."""
    call = {"num_frames": 9, "height": size, "width": size, "num_inference_steps": steps, "output_type": "latent"}
    return pipe(prompt, negative_prompt="d e", generator=torch.Generator().manual_seed(seed), **call | more).frames


def windows_reusing(kind: str = "retention", policy: Any = None, **fields: Any) -> Any:
    """For 3×4×4 tokens: windows that drop most of them, and statistics of earlier steps for what they drop."""
    from fastdit import Config, Phase, Window
    from fastdit.config import Reuse

    reuse = Reuse(kind=kind, refresh=3, **fields)
    return Config((Phase((1.0, 0.0), policy or Window(size=(1, 1, 1)), reuse=reuse),), (1, 2, 2), min_tokens=0)


class Largest(TorchDispatchMode):
    """Within it, the most elements that an operation's answer in float32 had: `seen`."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.seen = max(self.seen, out.numel())
        return out


def environment(**more: str) -> dict[str, str]:
    """For subprocesses: no network, and no more threads than this process may use."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | more


def command(*arguments: object) -> list[str]:
    """`fastdit` with these arguments, by this interpreter."""
    return [sys.executable, "-m", "fastdit", *map(str, arguments)]


def fastdit(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end; `more` are environment variables."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=900, env=environment(**more))


def probe(path: Path) -> str:
    """What ffmpeg says of a file."""
    import imageio_ffmpeg

    run = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True)
    return run.stderr


def decode(path: Path) -> Any:
    """All frames of a video, uint8 [F, H, W, 3], by ffmpeg."""
    import imageio_ffmpeg
    import numpy as np

    size = re.search(r", (\d+)x(\d+)", probe(path))
    assert size is not None, probe(path)
    raw = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
        capture_output=True,
        check=True,
    ).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, int(size[2]), int(size[1]), 3)


def call(monkeypatch: Any, *arguments: object) -> int:
    """The entry point in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["fastdit", *map(str, arguments)])
    from fastdit.apps.cli import main

    with pytest.raises(SystemExit) as exited:
        main.main()
    assert isinstance(exited.value.code, int)
    return exited.value.code


def enter(
    denoiser: Any, grid: tuple[int, int, int], sigma: float = 0.5, before: int = 0, after: int = 0, latents: Any = None
) -> Any:
    """Begin a call of an installed denoiser by hand, so that its sites can be called by themselves; keep what it returns."""
    import torch

    from fastdit.planning.adapter import Facts
    from fastdit.planning.sequence import SequenceSpec
    from fastdit.runs.branches import Call

    facts, sequence = Facts(grid, torch.tensor(sigma), before, after), SequenceSpec((grid,), before, after)
    call = Call(denoiser.number, None, b"", (), torch.zeros(0) if latents is None else latents)
    forward = denoiser.handle.enter(sigma, None, call, sequence)
    denoiser.call.token, denoiser.call.facts = torch.tensor([forward.number]), facts
    return forward


def modular(guider: Any) -> Any:
    """A modular pipeline of Wan, tiny."""
    from diffusers.modular_pipelines import WanBlocks

    pipe = tiny_wan_pipeline()
    found = WanBlocks().init_pipeline()
    parts = {name: getattr(pipe, name) for name in ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")}
    found.update_components(**parts, guider=guider)
    found.set_progress_bar_config(disable=True)
    return found


def render_modular(pipe: Any, steps: int = 10) -> Any:
    """What a modular pipeline draws."""
    torch.manual_seed(7)  # of the dropout of auto guidance
    return pipe(
        prompt="a b c", negative_prompt="d e", num_frames=9, height=64, width=64, num_inference_steps=steps, output="latents",
        output_type="pt", generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
