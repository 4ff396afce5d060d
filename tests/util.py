"""Shared by tests: a small real pipeline with random weights, the command line as a subprocess, reading of mp4s."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

WORDS = ["a", "red", "green", "blue", "circle", "square", "triangle", "moving", "left", "right", "up", "down", "and"]


def tiny_wan_pipeline(**denoiser: Any) -> Any:
    """A WanPipeline of real classes: 2 layers, 2 heads of 64, patch (1, 2, 2), 8× smaller in space and 4× in time.

    So height and width must be multiples of 16. proj_out is drawn too: it starts at zero, and nothing would be seen.
    """
    import torch
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    torch.manual_seed(0)
    text = UMT5Config(
        vocab_size=len(vocabulary),
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


def environment(**more: str) -> dict[str, str]:
    """For subprocesses: no network, and no more threads than this process may use."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | more


def command(*arguments: object) -> list[str]:
    """`fastdit` with these arguments, by this interpreter."""
    return [sys.executable, "-m", "fastdit", *map(str, arguments)]


def fastdit(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end; `more` are environment variables."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, env=environment(**more))


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
