"""The pooled remainder, on CUDA: of each dropped tile one key and one value, the means of its own, with log n on its logit.

A launch of its own behind the attention kernel, whichever of the two that was and in whatever format: it goes on from that
one's answer and LSE, in the inputs' own type, and leaves its own in their place. Of the means of keys, the mean of all is
taken out before they are rounded and put back in float32: it is what channels of real keys have in common.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastdit.core.block_mask import tile_map
from fastdit.kernels.pack import Rows, strides, tile_means
from fastdit.kernels.triton_forward import raise_fault

LN_2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1e30)
"""As in `triton_forward.py`: a finite "no key yet"."""


def settings(dim: int, wide: bool) -> dict[str, int]:
    """For heads of `dim` channels, wide: in float32. Fits every GPU (tests/kernels/test_compile.py).

    With the means, 660 tiles and 40 heads of 128 took 3.9 ms on an H200; 7.8 with half the queries a program, 4.6 with twice,
    5.6 with twice the warps, 4.2 with two stages.
    """
    if wide and dim > 128:
        return {"BM": 16, "BN": 16, "num_warps": 4, "num_stages": 2}
    large = wide or dim > 128
    return {"BM": 32 if wide else 64, "BN": 32, "num_warps": 8 if large else 4, "num_stages": 2 if large else 3}


def add(
    q: Tensor, k: Tensor, v: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, q_order: Tensor, k_order: Tensor, scale: float,
    out: Tensor, lse: Tensor, fault: Tensor | None = None,
) -> None:  # fmt: skip
    """Brings attention to the kept tiles, out [B, H, Nq, D] and lse [B, H, Nq], to attention to all of them, in place.

    q, k, v, the mask and fault as in `cuda.block_sparse_attention`; scale in base 2.
    """
    B, H, N, D = q.shape
    launch = settings(D, q.element_size() == 4)
    rows = Rows.of(q_order.shape[1], launch["BM"], min(launch["BM"], 32))
    width, more = max(16, triton.next_power_of_2(D)), -len(k_order) % launch["BN"]
    keys, values = (tile_means(x, k_order) for x in (k, v))
    centre = keys.mean(2, keepdim=True)
    means = [F.pad(x, (0, width - D, 0, more)).to(q.dtype) for x in (keys - centre, values)]
    kept = F.pad(tile_map(kv_num_blocks, kv_indices), (0, more), value=True)
    weight = F.pad((k_order >= 0).sum(-1).float().log2(), (0, more)).where(~kept, float("-inf")).contiguous()
    _add[(len(q_order) * rows.parts, B * H)](
        q, *means, centre, weight, q_order, out, lse, fault,
        scale, H, H // k.shape[1], N, weight.shape[-1], rows.slots, *q.stride()[:3],
        *out.stride()[:3], *strides(weight), D=D, DP=width, Q_PARTS=rows.parts, FLAG=fault is not None,
        **launch | {"BM": rows.block},
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["Fault"])
def _add(
    Q, K, V, Centre, Weight, QOrder, Out, Lse, Fault,
    scale, heads, group, n_q, tiles, slots, q_b, q_h, q_n, o_b, o_h, o_n, w_b, w_h,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, Q_PARTS: tl.constexpr, FLAG: tl.constexpr,
):  # fmt: skip
    """One program a block of a query tile. K, V [B·Hkv, tiles, DP]; Centre [B·Hkv, D] of K; Weight [.., q_tiles, tiles]:
    log2 n, −inf of kept tiles."""
    tile = tl.program_id(0) // Q_PARTS
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    h = bh % heads
    d = tl.arange(0, DP)
    columns = tl.arange(0, BN)
    slot = (tl.program_id(0) % Q_PARTS) * BM + tl.arange(0, BM)
    token = tl.load(QOrder + tile * slots + slot, mask=slot < slots, other=-1)
    live = token >= 0
    inside = live[:, None] & (d < D)[None, :]
    Out += b * o_b + h * o_h
    Lse += bh * n_q
    q = tl.load(Q + b * q_b + h * q_h + token[:, None] * q_n + d[None, :], mask=inside, other=0.0)
    lse = tl.load(Lse + token, mask=live, other=float("-inf"))
    acc = tl.load(Out + token[:, None] * o_n + d[None, :], mask=inside, other=0.0).to(tl.float32)
    kv = b * (heads // group) + h // group
    centre = tl.load(Centre + kv * D + d, mask=d < D, other=0.0)
    shift = scale * tl.sum(q.to(tl.float32) * centre[None, :], 1)
    some = lse != float("-inf")  # NaN counts as seen, and stays NaN
    top = tl.where(some, lse / LN_2 - shift, FLOOR)
    total = tl.where(some, 1.0, 0.0)
    K += kv * tiles * DP
    V += kv * tiles * DP
    Weight += b * w_b + h * w_h + tile * tiles
    for start in range(0, tiles, BN):
        k = tl.load(K + start * DP + (columns[:, None] * DP + d[None, :]))
        s = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale + tl.load(Weight + start + columns)[None, :]
        new = tl.maximum(top, tl.max(s, 1))
        keep = tl.math.exp2(top - new)
        p = tl.math.exp2(s - new[:, None])
        v = tl.load(V + start * DP + (columns[:, None] * DP + d[None, :]))
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="tf32x3")
        total = total * keep + tl.sum(p, 1)
        top = new
    # The tokens are loaded again, as in `triton_forward.py`: kept through the loop, they would not fit the registers.
    token = tl.load(QOrder + tile * slots + slot, mask=slot < slots, other=-1)
    live = token >= 0
    inside = live[:, None] & (d < D)[None, :]
    seen = total != 0
    total = tl.where(seen, total, 1.0)
    out = (acc / total[:, None]).to(Out.dtype.element_ty)
    tl.store(Out + token[:, None] * o_n + d[None, :], out, mask=inside)
    lse = tl.where(seen, (top + shift + tl.math.log2(total)) * LN_2, float("-inf"))
    tl.store(Lse + token, lse, mask=live)
    if FLAG:
        raise_fault(Fault, out, lse, live, 1)
