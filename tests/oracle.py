"""Inputs that hurt kernels, and what is right about them in float64, every pair written out."""

import torch

from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.quant import emulate
from fastdit.core.reference import relative_error, token_mask

ROUNDING = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7}
LAYOUT = Layout((2, 5, 9), (1, 4, 8), text_len=5)  # tiles that overhang, and text
SCALE = 0.2


def hurtful(batch, heads, tokens, dim, dtype, seed=0):
    """Channel-biased K, a spike, V with a mean; in diffusers' strides, inside a buffer of NaN."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, tokens, heads, dim, generator=generator) for _ in range(3))
    k = k + 3 * torch.randn(dim, generator=generator)
    q[0, tokens // 2] *= 4
    v = v + 1
    poisoned = [torch.full((batch, tokens, heads, dim + 8), float("nan"), dtype=dtype) for _ in range(3)]
    for buffer, x in zip(poisoned, (q, k, v), strict=True):
        buffer[..., :dim] = x.to(dtype)
    return [buffer[..., :dim].transpose(1, 2) for buffer in poisoned]


def draw(heads=2, kv_heads=2, dtype=torch.float32, share=0.5, seed=0):
    q, k, v = hurtful(1, heads, LAYOUT.length, 32, dtype, seed)
    tile_map = torch.rand(1, heads, LAYOUT.num_tiles, LAYOUT.num_tiles, generator=torch.Generator().manual_seed(seed)) < share
    m = BlockMask.from_tile_map(tile_map, LAYOUT)
    return q, k[:, :kv_heads], v[:, :kv_heads], tile_map, (m.kv_num_blocks, m.kv_indices, m.q_order, m.k_order)


def attend(logits, values):
    lse = logits.logsumexp(-1)
    return (logits - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp() @ values, lse


def exact(q, k, v, tile_map, bias=0.0, pooled=False, quant=None, q_order=None):
    """float64, every pair written out; with a format, what its rounding of q, k and v makes of it (P is not rounded)."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits, values = (q @ k.mT) * SCALE, v
    if quant is not None:
        x = emulate(q, k, v, quant, LAYOUT.order() if q_order is None else q_order, LAYOUT.order())
        logits, values = (x.q @ x.k.mT) * SCALE, x.v
        logits = logits if x.shift is None else logits + SCALE * x.shift[..., None]
        values = values if x.mean is None else values + x.mean
    logits = (logits + bias).masked_fill(~tile_map, float("-inf"))
    if not pooled:
        return attend(logits, values)
    real, counts = (LAYOUT.order() >= 0)[..., None], LAYOUT.counts()[:, None]
    means = [(LAYOUT.to_tiles(x) * real).sum(3) / counts for x in (k, v)]
    far = (q @ means[0].mT) * SCALE + LAYOUT.counts().double().log()
    first = LAYOUT.order()[:, 0]
    far = far.masked_fill(tile_map[..., first], float("-inf"))
    return attend(torch.cat([logits, far], -1), torch.cat([values, means[1]], 2))


def check(got, quant, q, k, v, tile_map, **more):
    """Budget: twice the error of the format's rounding, a rounding of P where it is eight bits, and one of float32."""
    tile_map = token_mask(LAYOUT, tile_map) if tile_map.shape[-2] == LAYOUT.num_tiles else tile_map
    out, lse = got
    expected, expected_lse = exact(q, k, v, tile_map, **{name: x for name, x in more.items() if name != "q_order"})
    rough, rough_lse = exact(q, k, v, tile_map, quant=quant, **more)
    budget = 2 * relative_error(rough, expected) + (0.03 if quant.pv == "fp8" else 1e-5)
    assert relative_error(out, expected) <= budget
    assert abs(float(out.double().norm() / expected.norm()) - 1) <= budget
    seen = ~expected_lse.isneginf()
    assert torch.equal(seen, ~lse.isneginf())
    assert (lse - expected_lse)[seen].abs().max() <= 2 * (rough_lse - expected_lse)[seen].abs().max() + 1e-4
    assert (out[~seen] == 0).all()
