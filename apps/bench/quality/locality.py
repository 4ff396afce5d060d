"""How local is the tiny transformer's self-attention? `python -m fastdit.apps.bench.quality.locality --json FILE`

Real clips are encoded, mixed with noise at several noise levels and run through the transformer once. In every layer
and head, for randomly chosen queries, the attention's mass is summed over the 3×3×3 tokens around the query, over the
5×9×9 around it, over its own frame, and over the quarter of all tiles that holds most of it; next to each stands what
uniform attention would give. An untrained transformer of the same shape is the control: sharp logits alone raise the
last of these sums, but only learning makes attention local.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit.apps.render.outputs import write_json
from fastdit.apps.tiny.attention import clean_latents
from fastdit.apps.tiny.model import make_transformer
from fastdit.apps.tiny.sizes import Size, parse_sizes
from fastdit.pipelines import embedded

SUMS = ("3x3x3", "5x9x9", "own frame", "best quarter of tiles")


class _Probe:
    """Replaces a layer's attention processor: measures, then calls the original."""

    def __init__(self, inner: Any, regions: Tensor, tiles: Tensor, queries: Tensor) -> None:
        self.inner, self.regions, self.tiles, self.queries = inner, regions, tiles, queries
        self.found = torch.zeros(0)

    def __call__(self, attn: Any, hidden: Tensor, text: Any = None, mask: Any = None, rotary: Any = None) -> Tensor:
        cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]

        def project(linear: Any, norm: Any) -> Tensor:
            a, b = norm(linear(hidden)).unflatten(2, (attn.heads, -1)).unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).transpose(1, 2)

        q, k = project(attn.to_q, attn.norm_q)[:, :, self.queries], project(attn.to_k, attn.norm_k)
        p = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)  # [B, heads, queries, N]
        sums = [(p * r).sum(-1) for r in self.regions]
        by_tile = torch.zeros(*p.shape[:3], int(self.tiles.max()) + 1).index_add_(3, self.tiles, p)
        sums.append(by_tile.topk(by_tile.shape[-1] // 4, -1).values.sum(-1))
        self.found = torch.stack([s.mean((0, 2)) for s in sums], -1)  # [heads, SUMS]
        return self.inner(attn, hidden, text, mask, rotary)


@torch.no_grad()
def measure(
    transformer: Any,
    pipe: Any,
    size: Size,
    n: int,
    levels: list[float],
    queries: int = 192,
) -> dict[str, Any]:
    """Sums by noise level, layer and head (shares of 1), for `n` clips and `queries` random queries of each."""
    z, text = clean_latents(pipe, n, size, seed=4)
    T, H, W = z.shape[2:]
    gen = torch.Generator().manual_seed(4)
    noise = torch.randn(z.shape, generator=gen)

    t, y, x = (c.flatten() for c in torch.meshgrid(*(torch.arange(s) for s in (T, H, W)), indexing="ij"))
    chosen = torch.randperm(T * H * W, generator=gen)[:queries]
    dt, dy, dx = ((c[chosen][:, None] - c[None]).abs() for c in (t, y, x))
    regions = torch.stack([(dt <= 1) & (dy <= 1) & (dx <= 1), (dt <= 2) & (dy <= 4) & (dx <= 4), (dt == 0).expand_as(dx)])
    tile = (t // 3 * ((H + 3) // 4) + y // 4) * ((W + 3) // 4) + x // 4  # tiles of 3×4×4 tokens
    uniform = [round(float(r.float().mean()), 4) for r in regions] + [0.25]

    stock = [block.attn1.processor for block in transformer.blocks]
    probes = [_Probe(p, regions.float(), tile, chosen) for p in stock]
    result: dict[str, Any] = {"uniform": dict(zip(SUMS, uniform, strict=True))}
    try:
        for block, probe in zip(transformer.blocks, probes, strict=True):
            block.attn1.processor = probe
        for s in levels:
            transformer(torch.lerp(z, noise, s), torch.full((n,), s * 1000), text, return_dict=False)
            found = torch.stack([p.found for p in probes])  # [layers, heads, SUMS]
            heads = [[[round(v, 3) for v in head] for head in layer] for layer in found.tolist()]
            mean = dict(zip(SUMS, (round(v, 4) for v in found.mean((0, 1)).tolist()), strict=True))
            result[f"noise level {s}"] = {"mean": mean, "layers, heads": heads}
    finally:
        for block, processor in zip(transformer.blocks, stock, strict=True):
            block.attn1.processor = processor
    return result


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="fastdit.apps.bench.quality.locality", description="How local is the attention?")
    ap.add_argument("--pipeline", type=Path, help="folder of the pipeline (default: the shipped one)")
    ap.add_argument("--sizes", default="33x128x128:4,33x256x256:2", help="FRAMESxHEIGHTxWIDTH:CLIPS, comma-separated")
    ap.add_argument("--levels", default=".95,.8,.5,.2", help="noise levels, comma-separated")
    ap.add_argument("--json", type=Path)
    args = ap.parse_args(argv)

    try:
        pipe: Any = embedded.load(args.pipeline)
    except FileNotFoundError as err:
        raise SystemExit(f"error: {err}") from None
    c = pipe.transformer.config
    untrained = make_transformer(c.in_channels, c.num_attention_heads, c.num_layers, c.ffn_dim, c.text_dim)
    levels = [float(s) for s in args.levels.split(",")]
    report = []
    for size, n in parse_sizes(args.sizes):
        row: dict[str, Any] = {"size": "x".join(map(str, size)), "clips": int(n), "sums": SUMS}
        row["trained"] = measure(pipe.transformer, pipe, size, int(n), levels)
        row["untrained"] = measure(untrained, pipe, size, int(n), levels[:1])
        report.append(row)
        print(json.dumps(row), flush=True)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
