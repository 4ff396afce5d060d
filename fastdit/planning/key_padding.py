"""Text trimming: keys that a mask hides for every query are cut from the sequence instead of being masked.

Pipelines pad prompts to a fixed length (256 tokens in HunyuanVideo, of which a prompt uses a few dozen) and hide the padding
with an attention mask over the whole joint sequence, video included. Masked attention computes the padding and discards it,
and a mask keeps SDPA from its fastest kernels. But exp(−∞) = 0: softmax over the remaining keys *is* the masked softmax.
Cutting the keys is therefore exact, in dense phases too, up to the order of sums.

`read` recognises such masks. Other masks (causal blocks, windows) are left to the original attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Runs = tuple[tuple[int, int], ...]
"""Tokens as half-open ranges (start, stop), ascending and not adjacent."""

HIDDEN = -9000.0
"""Additive masks hide with −∞, the dtype's minimum or −10000 (−9984 in bfloat16); exp of each is 0 in float32."""


class KeptKeys(NamedTuple):
    """The keys that a mask keeps, for each batch element.

    square: the mask hides these tokens as queries too, so their output rows are 0 (a row without keys).
    """

    kept: tuple[Runs, ...]
    square: bool = False


def read(mask: Tensor, batch: int, queries: int, keys: int) -> KeptKeys | None:
    """The keys that an attention mask keeps. mask: bool or additive float, broadcastable to [B, H, queries, keys].

    None if the mask hides more than whole keys (it differs between heads or queries), adds a real bias, or hides every key of
    a batch element. Blocks on a GPU: `Forward.kept_keys` in `runs/forward.py` calls it once per forward.
    """
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    for axis in (1, 2):  # read an expanded axis once
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    if mask.shape[1] == mask.shape[2] == 1:
        mask = mask.cpu()  # the only synchronisation for such masks
    shown = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((shown | (mask < HIDDEN)).all()):
        return None
    if shown.shape[1] > 1 and not bool((shown == shown[:, :1]).all()):
        return None
    shown = shown[:, 0]
    square = False
    if shown.shape[1] == 1 or bool((shown == shown[:, :1]).all()):
        valid = shown[:, 0]
    elif queries == keys:
        valid, square = shown.diagonal(dim1=1, dim2=2), True
        if not bool((shown == (valid[:, None] & valid[:, :, None])).all()):
            return None
    else:
        return None
    valid = valid.expand(batch, keys).cpu()
    if not bool(valid.any(-1).all()):
        return None
    return KeptKeys(tuple(map(_runs, valid)), square)


def why_not(mask: Tensor) -> str:
    """Why `read` does not accept a mask, in words."""
    hides = mask.dtype == torch.bool or bool((mask < HIDDEN).any())
    return "the mask hides more than whole keys" if hides else "the mask adds to the logits and hides nothing"


def _runs(valid: Tensor) -> Runs:
    edges = torch.nn.functional.pad(valid.to(torch.int8), (1, 1)).diff().nonzero().flatten().tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def alike(kept: tuple[Runs, ...]) -> dict[Runs, list[int]]:
    """Group batch elements by the tokens that they keep."""
    found: dict[Runs, list[int]] = {}
    for row, runs in enumerate(kept):
        found.setdefault(runs, []).append(row)
    return found


def count(runs: Runs, start: int = 0, stop: int | None = None) -> int:
    """Number of tokens of these runs within [start, stop)."""
    return sum(max(0, min(b, stop if stop is not None else b) - max(a, start)) for a, b in runs)


def gaps(runs: Runs, length: int) -> Runs:
    """The complement of the runs in [0, length)."""
    edges = [0, *(edge for run in runs for edge in run), length]
    return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)


def gather_runs(x: Tensor, runs: Runs) -> Tensor:
    """x [B, N, …] -> [B, kept, …]: a view if there is one run, [B, 0, …] if there is none."""
    pieces = [x[:, a:b] for a, b in runs or ((0, 0),)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def scatter_runs(out: Tensor, x: Tensor, runs: Runs) -> None:
    """Inverse of `gather_runs`: write x [B, kept, …] into out [B, N, …]."""
    start = 0
    for a, b in runs:
        out[:, a:b] = x[:, start : start + b - a]
        start += b - a
