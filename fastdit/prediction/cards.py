"""How fast and how large a device is: rates fitted to the rows of docs/results, published figures of other GPUs.

H100 and H200: least squares by hand over the denoisers of docs/results/gpu_denoisers.json and gpu_denoisers_h100.json, which
differ by 1 to 3 %, so both have the same rates. CPU: docs/results/bench_cpu.json (two cores of an EPYC, float32); another CPU
is faster or slower, and its ratio about the same. Every other GPU has an H100's rates times its share of an H100's published
arithmetic and bandwidth, which nobody has measured: such figures are "estimated".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Card:
    """A GPU as its maker publishes it. memory: GB; dense16, dense8: TFLOP/s without sparsity, summed in float32, in bfloat16
    and FP8 (None: has no FP8); bandwidth: GB/s."""

    name: str
    memory: float
    dense16: float
    dense8: float | None
    bandwidth: float
    measured: bool = False


CARDS = {
    card.name: card
    for card in (
        Card("RTX 3090", 24, 71, None, 936),
        Card("RTX 4070", 12, 58.3, 116.6, 504),
        Card("RTX 4080", 16, 97.5, 194.9, 717),
        Card("RTX 4090", 24, 165.2, 330.3, 1008),
        Card("RTX 5080", 16, 112.6, 225.1, 960),
        Card("RTX 5090", 32, 209.5, 419, 1792),
        Card("A100", 80, 312, None, 2039),
        Card("L40S", 48, 362, 733, 864),
        Card("H100", 80, 989, 1979, 3350, measured=True),
        Card("H200", 141, 989, 1979, 4800, measured=True),
    )
}
CPU = "cpu"


@dataclass(frozen=True)
class Rates:
    """FLOP/s: attention (dense), sparse (of the pairs in kept tiles, padding included), linear (matrix products of everything
    else). eight_bits: how much faster (sparse, dense) attention is in 8 bits. with_lse: time of a dense call that a refresh
    makes, over the stock one. Seconds for a token, channel and layer: other (norms, activations, rotary embedding), packing,
    residual (read and added, or written). host: least seconds of a layer, what the CPU takes to launch it."""

    attention: float
    sparse: float
    linear: float
    eight_bits: tuple[float, float]
    with_lse: float
    other: float
    packing: float
    residual: float
    host: float = 0.0


HOPPER = Rates(590e12, 560e12, 780e12, (1.2, 1.36), 0.94, 54e-12, 2.1e-12, 3.2e-12, 2.6e-3)
PROCESSOR = Rates(166e9, 160e9, 81e9, (1.0, 1.0), 1.13, 0.0, 0.0, 0.0)
PCIE = 55e9
"""Bytes a second between a GPU and the host's page-locked memory, as statistics there take (a step 1.09 times as long)."""


def card(name: str) -> Card:
    """The card of a name, in any spelling: "H100", "rtx4090", "NVIDIA GeForce RTX 4090". Raises ValueError for an unknown one,
    listing the names."""
    asked = _plain(name)
    found = [each for each in CARDS.values() if asked and (_plain(each.name) in asked or asked == _plain(each.name)[3:])]
    # "RTX 4080 SUPER", "4070 Ti" and "Laptop" are other chips
    if not found or re.search(r"super|ti$|laptop|max-?q|mobile", name, re.IGNORECASE):
        raise ValueError(f"unknown gpu {name!r}: choose one of {', '.join((CPU, *CARDS))}")
    return found[0]


def rates(found: Card | None) -> Rates:
    """The rates of a card; None: of the CPU."""
    if found is None:
        return PROCESSOR
    if found.measured:
        return HOPPER
    like = CARDS["H100"]
    compute, stream = found.dense16 / like.dense16, like.bandwidth / found.bandwidth
    products = {name: getattr(HOPPER, name) * compute for name in ("attention", "sparse", "linear")}
    moved = {name: getattr(HOPPER, name) * stream for name in ("other", "packing", "residual")}
    eight = HOPPER.eight_bits if found.dense8 is not None else (1.0, 1.0)
    return replace(HOPPER, **products, **moved, eight_bits=eight)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
