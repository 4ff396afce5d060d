"""From checkpoints to a WanPipeline folder: `python -m fastdit.apps.tiny.build RUN_DIR PIPELINE_DIR`.

Takes the averaged weights of RUN_DIR's vae.pt and dit.pt with its codec and tokenizer, and saves them as bfloat16
(loaded as float32 by default); the text encoder stays float32, because transformers loads it as it was saved.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fastdit.apps.tiny.codec import Codec, make_vae
from fastdit.apps.tiny.model import make_text_encoder, make_transformer

SHIFT = 5.0  # of the saved scheduler


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    _rename_tokenizer(folder / "tokenizer_config.json")


def load_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def _rename_tokenizer(path: Path) -> None:
    """transformers 5 writes a class name that transformers 4 does not know; the older name loads in both."""
    path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def build(run: Path, out: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
    from safetensors.torch import load_file

    needed = ["dit.pt", "codec.safetensors"] + ([] if (run / "vae").exists() else ["vae.pt"])
    for name in needed:
        if not (run / name).exists():
            raise SystemExit(f"error: {run / name} is missing; run fastdit.apps.tiny.train --out {run} first")
    state = torch.load(run / "dit.pt", map_location="cpu", weights_only=True)["ema"]
    dit_state, text_state = state["transformer"], state["text_encoder"]
    dim, channels = dit_state["patch_embedding.weight"].shape[:2]
    layers = 1 + max(int(k.split(".")[1]) for k in dit_state if k.startswith("blocks."))
    ffn = dit_state["blocks.0.ffn.net.0.proj.weight"].shape[0]
    codec, tokenizer = Codec.load(run / "codec.safetensors"), load_tokenizer(run / "tokenizer")

    transformer = make_transformer(channels, dim // 64, layers, ffn)
    transformer.load_state_dict(dit_state)
    text_encoder = make_text_encoder(len(tokenizer))
    text_encoder.load_state_dict(text_state)
    vae = make_vae(channels)
    if (run / "vae.pt").exists():
        vae.load_state_dict(torch.load(run / "vae.pt", map_location="cpu", weights_only=True)["ema"]["vae"])
    else:  # taken over unchanged from the pipeline that training began with
        vae.load_state_dict(load_file(run / "vae" / "diffusion_pytorch_model.safetensors"))
    pipe: Any = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae.to(torch.bfloat16),
        transformer=transformer.to(torch.bfloat16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
    pipe.save_pretrained(out)
    for file in ("model_index.json", "tokenizer/tokenizer_config.json"):
        _rename_tokenizer(out / file)
    codec.save(out / "codec.safetensors")


if __name__ == "__main__":
    ap = argparse.ArgumentParser(prog="fastdit.apps.tiny.build", description=__doc__.splitlines()[0])
    ap.add_argument("run", type=Path)
    ap.add_argument("out", type=Path)
    args = ap.parse_args()
    build(args.run, args.out)
    print(f"pipeline in {args.out}: {sum(f.stat().st_size for f in args.out.rglob('*') if f.is_file()) / 1e6:.1f} MB")
