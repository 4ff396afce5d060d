"""From light checkpoints to a WanPipeline folder:

    python -m fastdit.apps.tiny.world.build FOLDER/few --vae FOLDER/vae --base DIR --out PIPELINE_DIR

The averaged weights are saved as bfloat16, the text encoder's as float32, because transformers loads them as they were
saved. The scheduler is UniPC of first order, which for these models is Euler on the levels 1 - i/n, shifted: n steps to 0
without the tiny last one that the stock Euler scheduler spends a forward on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fastdit.apps.tiny.tokenizer import rename_tokenizer
from fastdit.apps.tiny.world import draw, latents, store
from fastdit.apps.tiny.world.words import UNDERSTOOD
from fastdit.pipelines.embedded import VOCABULARY


def scheduler(shift: float) -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=1,
        disable_corrector=list(range(100)),
    )


def build(checkpoint: Path, vae: Path, base: Path, out: Path, shift: float = 5.0) -> None:
    from diffusers import WanPipeline

    codec, tokenizer = latents.prepare(base)
    models = draw.build(store.read_light(checkpoint.parent, checkpoint.name)["ema"], len(tokenizer))
    pipe: Any = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=models["text_encoder"],
        vae=draw.load_vae(vae, codec).to(torch.bfloat16),
        transformer=models["transformer"].to(torch.bfloat16),
        scheduler=scheduler(shift),
    )
    pipe.save_pretrained(out)
    for file in ("model_index.json", "tokenizer/tokenizer_config.json"):
        rename_tokenizer(out / file)
    codec.save(out / "codec.safetensors")
    (out / VOCABULARY).write_text("\n".join(sorted(UNDERSTOOD)) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="fastdit.apps.tiny.world.build", description=__doc__.splitlines()[0])
    add = ap.add_argument
    add("checkpoint", type=Path, help="FOLDER/NAME of the transformer's light checkpoint")
    add("--vae", type=Path, required=True, help="FOLDER/NAME of the autoencoder's")
    add("--base", type=Path, required=True, help="folder of the codec and the tokenizer")
    add("--out", type=Path, required=True)
    add("--shift", type=float, default=5.0, help="of the scheduler; for few steps the one they were learned with")
    args = ap.parse_args(argv)
    build(args.checkpoint, args.vae, args.base, args.out, args.shift)
    megabytes = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file()) / 1e6
    print(f"pipeline in {args.out}: {megabytes:.1f} MB")


if __name__ == "__main__":
    main()
