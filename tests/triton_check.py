"""The Triton kernels on the tests' device, held against float64. Needs Triton."""

import torch
from device import DEVICE, there
from oracle import ROUNDING

from fastdit.core.block_mask import BlockMask
from fastdit.core.reference import attention, relative_error, token_mask
from fastdit.kernels import cpu
from fastdit.kernels import cuda as kernels

block_sparse_attention, dense_attention = there(kernels.block_sparse_attention), there(kernels.dense_attention)


def check(layout, tile_map, q, k, v, quant, scale=None, splits=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    m = BlockMask.from_tile_map(tile_map, layout)
    masks = (m.kv_num_blocks, m.kv_indices, m.q_order, m.k_order)
    exact, exact_lse = attention(q.double(), k.double(), v.double(), token_mask(layout, tile_map), scale)
    emulated, emulated_lse = cpu.block_sparse_attention(q.float(), k.float(), v.float(), *masks, scale, quant)
    rounding = ROUNDING[q.dtype]
    budget = 2 * relative_error(emulated, exact) + rounding
    seen = ~exact_lse.isneginf()
    worst = (emulated_lse - exact_lse)[seen].abs().max() if seen.any() else 0
    # On a GPU short sequences are cut into parts: whole lists are another kernel.
    for parts in {splits, 1} if DEVICE == "cuda" else {splits}:
        out, lse = block_sparse_attention(q, k, v, *masks, scale, quant, splits=parts)
        assert out.dtype == q.dtype
        assert out.stride() == torch.empty_like(q).stride()
        assert out.isfinite().all()
        assert relative_error(out, exact) <= budget
        if exact.norm() > 0:
            assert abs(float(out.double().norm() / exact.norm()) - 1) <= budget
        assert torch.equal(lse.isneginf(), ~seen)
        assert not seen.any() or (lse - exact_lse)[seen].abs().max() <= 2 * worst + 8 * rounding
        assert (out[~seen] == 0).all()
