"""Have a checkpoint draw many captions and judge what it drew:

    python -m fastdit.apps.tiny.world.evaluate FOLDER/NAME --base DIR --vae FOLDER/vae --size 33x256x256 --clips 200 --json FILE

Without a checkpoint: the ceilings (drawn clips as they are, through the codec and through the autoencoder) and the negative
controls, which must fail: every clip under another's caption, and drawn clips whose solids are squeezed into eggs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.apps.tiny.codec import psnr
from fastdit.apps.tiny.sheet import sheet
from fastdit.apps.tiny.sizes import Size
from fastdit.apps.tiny.world import draw, latents
from fastdit.apps.tiny.world.judge import MEASURES, Judge, ask, summary
from fastdit.apps.tiny.world.render import Renderer
from fastdit.apps.tiny.world.scene import Scene, pack

EGG = (0.938, 0.018)  # width over height, and one-sidedness, of the circles of the flat model at 33×256×256


def egg(renderer: Renderer, scene: Scene, size: Size, aspect: float = EGG[0], point: float = EGG[1]) -> Tensor:
    """The scene's clip [3, F, H, W] with every solid squeezed to `aspect` and made narrower above than below."""
    video, truth = renderer.with_truth(pack([scene]), *size)
    back = renderer(pack([Scene((), scene.floor, scene.backdrop, scene.camera)]), *size)[0]
    out = back.clone()
    H, W = size[1:]
    ys, xs = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    ys, xs = ys.to(out), xs.to(out)
    for i in range(len(scene.things)):
        mask, place = truth.masks[0, i], truth.place[0, i]
        for f in range(size[0]):
            x, y = place[f]
            half = mask[f].sum().sqrt() / 1.77
            wider = aspect**0.5 * (1 + point * (ys - y) / half.clamp(min=1))
            grid = torch.stack([(x + (xs - x) / wider) * 2 / W - 1, (y + (ys - y) * aspect**0.5) * 2 / H - 1], -1)
            moved = F.grid_sample(torch.cat([video[0, :, f] * mask[f], mask[f][None]])[None], grid[None], align_corners=False)[
                0
            ]
            out[:, f] = out[:, f] * (1 - moved[3]) + moved[:3]
    return out


def judged(judge: Judge, clip: Callable[[int], Tensor], asked: list[Scene]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = [judge(clip(i), s) for i, s in enumerate(asked)]
    return rows, summary(rows, asked)


def controls(base: Path, vae: Path | None, size: Size, n: int, device: torch.device, seed: int) -> dict[str, Any]:
    """Ceilings and negative controls on `n` drawn clips."""
    asked, _ = ask(n, seed)
    renderer, judge = Renderer(device), Judge(device)
    codec, tokenizer = latents.prepare(base)
    net = draw.load_vae(vae, codec) if vae else None
    painter = draw.Painter({}, codec, tokenizer, device, net)
    real = [renderer(pack([s]), *size)[0] for s in asked]
    z = [painter.codec.encode(v[None]) for v in real]
    through = [painter.decode(one)[0].clamp(-1, 1) for one in z]
    result = {
        "drawn clips": judged(judge, lambda i: real[i], asked)[1],
        "through the autoencoder" if vae else "through the codec": judged(judge, lambda i: through[i], asked)[1],
        "other captions": judged(judge, lambda i: real[i - 1], asked)[1],
        "eggs": judged(judge, lambda i: egg(renderer, asked[i], size), asked)[1],
        "psnr, codec": round(psnr(torch.cat([painter.codec.decode(one).clamp(-1, 1) for one in z]), torch.stack(real)), 2),
    }
    if vae:
        result["psnr, autoencoder"] = round(psnr(torch.stack(through), torch.stack(real)), 2)
    return result


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(
        prog="fastdit.apps.tiny.world.evaluate", description="Judge a checkpoint of the world's model."
    )
    add = ap.add_argument
    add("checkpoint", type=Path, nargs="?", help="FOLDER/NAME of a light checkpoint; without, ceilings and controls")
    add("--base", type=Path, required=True, help="folder of the codec and the tokenizer")
    add("--vae", type=Path, help="FOLDER/NAME of the autoencoder's light checkpoint")
    add("--size", default="33x256x256", help="FRAMESxHEIGHTxWIDTH")
    add("--clips", type=int, default=200)
    add("--steps", type=int, default=30)
    add("--guidance", type=float, default=3.0)
    add("--shift", type=float, default=5.0)
    add("--batch", type=int, default=8)
    add("--seed", type=int, default=77, help="of the captions")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path)
    add("--sheet", type=Path, help="PNG of the first twelve clips")
    args = ap.parse_args(argv)
    frames, height, width = (int(n) for n in args.size.split("x"))
    size, device, start = (frames, height, width), torch.device(args.device), time.monotonic()
    row: dict[str, Any] = {"size": args.size, "clips": args.clips}
    if args.checkpoint is None:
        row |= controls(args.base, args.vae, size, args.clips, device, args.seed)
    else:
        asked, captions = ask(args.clips, args.seed)
        painter = draw.load(args.checkpoint, args.base, device, args.vae)
        videos = painter.clips(captions, size, args.batch, steps=args.steps, guidance=args.guidance, shift=args.shift)
        row |= {"checkpoint": args.checkpoint.name, "steps": args.steps, "guidance": args.guidance, "shift": args.shift}
        row["seconds to draw"] = round(time.monotonic() - start, 1)
        rows, row["judge"] = judged(Judge(device), lambda i: videos[i], asked)
        row["wrong"] = [
            f"{c}: {', '.join(m for m in MEASURES if not r[m])} {json.dumps(_short(r['numbers']))}"
            for c, r in zip(captions, rows, strict=True)
            if not r["all"]
        ]
        if args.sheet:
            sheet(list(videos[:12]), args.sheet, columns=2, shots=4)
    print(json.dumps({k: v for k, v in row.items() if k != "wrong"}), flush=True)
    if args.json:
        args.json.write_text(json.dumps(row, indent=1) + "\n")


def _short(numbers: dict[str, Any]) -> dict[str, Any]:
    def mean(v: Any) -> float:
        return round(sum(v) / len(v), 4) if isinstance(v, list) else round(v, 4)

    return {k: [round(x, 3) for x in v] if k == "iou" else mean(v) for k, v in numbers.items() if not isinstance(v, list) or v}


if __name__ == "__main__":
    main()
