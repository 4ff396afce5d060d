"""Forms in which a residual [B, H, N, D] is kept from one dense step to the next: from 4 bytes a value to a few bits a row.

``float32``, ``bfloat16``  as they are.
``fp8``     E4M3, a float32 scale a row (largest value / 448).
``int4``    two values a byte, a bfloat16 scale a row (largest value / 7).
``pca4``, ``pca2``, ``pca1``  about 3.4, 1.6 and .8 bits a value. Rows of a head lie near few directions: each head is turned
            into its principal axes (uncentred, as the mean matters too), its coefficients on the first of them are kept in 8,
            on the next in 4 and on the next in 2 bits (`PCA` has how many), and the rest is dropped. That is transform coding,
            bits laid out by variance (Huang & Schultheiss 1963). Steps are Max's (1960) for a Gauss-like coefficient of that
            variance, and what a code stands for is fitted by least squares. docs/statistics.md has what each costs.
``mean4``, ``mean16``  as ``pca1``, of the means of 4 or 16 consecutive tokens.

A row's length is kept beside it, so a row is coded relative to itself, and long rows do not take the steps of short ones.

The packed layout, which a kernel may read as it lies (contiguous, heads outermost; on the GPU data of fp8, like
float32's and bfloat16's, has the strides of what it was made from):

    fp8     data [B, H, N, D] float8_e4m3fn, scale [B, H, N, 1] float32;      x = data · scale
    int4    data [B, H, N, ⌈D/2⌉] uint8, scale [B, H, N, 1] bfloat16;         x = (nibble − 8) · scale
            value 2j in the low nibble of byte j, value 2j + 1 in the high one; an odd D ends with a high nibble of 8
    pca*    data [B, H, M, S] uint8, gain [B, H, M, 1] uint8, axes [B, H, R, D] bfloat16, M = ⌈N / tokens of a mean⌉
            a row's S bytes: w codes of 8 bits, m of 4 (⌈m/2⌉ bytes), n of 2 (⌈n/4⌉ bytes), each part beginning at a whole byte,
            lowest bits first; R = w + m + n
            x_i = 2^((gain_j − 128) / 4) · Σ_r (code_jr − (2^bits_r − 1)/2) · axes_r,   j = i // tokens of a mean
            gain 0 says x = 0, gain 255 that the row was not finite: x = NaN

`axes` carry the axes' steps and the head's own magnitude, so that no other scale is needed. Everything is worked out by parts
of whole heads (`parts`), in float32, and no copy of the whole in float32 is ever made. Nothing here waits for a GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
PCA = {"pca4": (4, 12, 12, 1), "pca2": (2, 4, 8, 1), "pca1": (1, 2, 4, 1), "mean4": (1, 2, 4, 4), "mean16": (1, 2, 4, 16)}
"""Axes in 8, 4 and 2 bits, in 32nds of D; tokens of a mean."""
FORMS = (*PLAIN, "int4", *PCA)
BITS = (8, 4, 2)
STEPS = {8: 0.035, 4: 0.36, 2: 1.0}
"""In standard deviations of a coefficient. Max (1960): .996 for 4 levels and .335 for 16; lengths of rows do not quite even out
the tails. 256 levels reach 4.5."""
TURNS = 5
"""Of the subspace iteration: the error is then within 1 % of that of the exact axes."""
FLOOR = 1e-5
"""Of the energy, added to each direction: keeps the iteration's products far from singular, whatever comes in."""
CLIP = 8.0
"""Rows longer than so many (geometric) mean lengths count as this long where axes and steps are chosen."""
TINY, FAR = torch.finfo(torch.float32).tiny, 2.0**28
"""The least length that is one; the farthest that a row may stand out of the mean length."""
PART_BYTES = 64 << 20
"""In float32, of what is worked on at a time: all heads of a 14B model at 720p would be 1.5 GB, several times over."""

Part = EllipsisType | tuple[slice, slice]


def parts(x: Tensor) -> Iterator[Part]:
    """x [B, H, N, D] in pieces of some heads of one batch element, whole where it is small (or has other dimensions)."""
    if x.ndim != 4 or 4 * x.numel() <= PART_BYTES:
        yield ...
        return
    heads = max(1, PART_BYTES // (4 * x.shape[2] * x.shape[3]))
    for b, first in itertools.product(range(x.shape[0]), range(0, x.shape[1], heads)):
        yield slice(b, b + 1), slice(first, first + heads)


def taken(size: int, pinned: bool) -> int:
    """Bytes that so many take: PyTorch rounds page-locked memory up to a power of two."""
    return 1 << (size - 1).bit_length() if pinned and size else size


def bytes_of(shape: tuple[int, ...], form: str, pinned: bool = False) -> int:
    """What a tensor of this shape takes in a form."""
    return sum(taken(math.prod(size) * dtype.itemsize, pinned) for size, dtype in layout(shape, form))


def layout(shape: tuple[int, ...], form: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of the tensors of a form, in the order of the module's docstring. Raises ValueError for a form that is
    none, or that needs [B, H, N, D] where the shape is another."""
    *rows, D = shape
    if form not in FORMS or (form in PCA and len(shape) != 4):
        raise ValueError(f"no form {form!r} for {list(shape)}: choose one of {', '.join(FORMS)}, pca and mean for [B, H, N, D]")
    if form in PLAIN:
        return [(shape, PLAIN[form])] + [((*rows, 1), torch.float32)] * (form == "fp8")
    if form == "int4":
        return [((*rows, -(-D // 2)), torch.uint8), ((*rows, 1), torch.bfloat16)]
    B, H, N = rows
    widths, means = widths_of(D, form), -(-N // PCA[form][3])
    size = sum(-(-count * bits // 8) for count, bits in widths)
    return [
        ((B, H, means, size), torch.uint8), ((B, H, means, 1), torch.uint8),
        ((B, H, sum(count for count, _ in widths), D), torch.bfloat16),
    ]  # fmt: skip


def widths_of(D: int, form: str) -> list[tuple[int, int]]:
    """How many axes of D have how many bits, in a pca form."""
    left, found = D, []
    for share, bits in zip(PCA[form], BITS, strict=False):
        count = min(left, -(-share * D // 32))
        left -= count
        found.append((count, bits))
    return found


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor [..., D] in one of `FORMS`, perhaps elsewhere. scale: as the layout has it, or None."""

    form: str
    shape: tuple[int, ...]
    data: Tensor
    scale: Tensor | None = None

    @staticmethod
    def empty(like: Tensor, form: str, host: bool) -> Stored:
        """Room for a tensor; in the host's memory page-locked, which a GPU reads and writes several times faster. Raises
        ValueError as `layout` does."""
        there: dict[str, Any] = {"device": "cpu", "pin_memory": like.is_cuda} if host else {"device": like.device}
        made = [torch.empty(shape, dtype=dtype, **there) for shape, dtype in layout(tuple(like.shape), form)]
        if form in PLAIN and not host:
            made[0] = torch.empty_like(like, dtype=PLAIN[form])  # strides of its own: it is read beside others like it
        kind = Principal if form in PCA else Int4 if form == "int4" else Stored
        return kind(form, tuple(like.shape), *made)

    @staticmethod
    def of(x: Tensor, form: str, host: bool = False) -> Stored:
        stored = Stored.empty(x, form, host)
        for part in parts(x):
            stored.put(x[part], part)
        return stored

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x for x in vars(self).values() if isinstance(x, Tensor))

    @property
    def as_is(self) -> bool:
        """Whether `load` gives what is stored itself, and makes nothing wide."""
        return self.form in PLAIN and self.scale is None

    def bytes(self) -> int:
        return sum(taken(x.nbytes, x.is_pinned()) for x in self.tensors)

    def put(self, x: Tensor, part: Part = ...) -> None:
        """Store x, which is this part of the whole (whole heads), worked out on x's device: fewer bytes have to travel."""
        if self.scale is not None:
            scale = x.abs().amax(-1, keepdim=True).float().div(448).clamp(min=TINY)
            self.scale[part] = scale
            x = x / scale
        self.data[part] = x.to(self.data.dtype)

    def load(self, like: Tensor, part: Part = ...) -> Tensor:
        """A part of it on the device of `like`, as it is stored, or, where it has to be worked out, in float32 (float64 where
        `like` is)."""
        found = [x[part].to(like.device, non_blocking=True) for x in self.tensors]
        return found[0] if self.as_is else self._wide(*found).to(torch.promote_types(like.dtype, torch.float32))

    def _wide(self, *tensors: Tensor) -> Tensor:
        data, scale = tensors
        return data.float() * scale

    def to(self, form: str, device: torch.device) -> Stored:
        """The same in another form, in the same place, worked out on a device."""
        whole = torch.empty(1, dtype=torch.float32, device=device).expand(self.shape)
        new = Stored.empty(whole, form, self.data.device != device)
        for part in parts(whole):
            new.put(self.load(whole, part).float(), part)
        return new


class Int4(Stored):
    """int4."""

    def put(self, x: Tensor, part: Part = ...) -> None:
        assert self.scale is not None
        scale = x.abs().amax(-1, keepdim=True).float().div(7).clamp(min=TINY).to(torch.bfloat16)
        self.scale[part] = scale
        code = (x / scale.to(x.dtype)).round().clamp(-7, 7).nan_to_num().add(8).to(torch.uint8)
        if x.shape[-1] % 2:
            code = F.pad(code, (0, 1), value=8)
        self.data[part] = code[..., ::2] | code[..., 1::2] << 4

    def _wide(self, *tensors: Tensor) -> Tensor:
        data, scale = tensors
        return unpacked(data, self.shape[-1], 4).float().sub(8) * scale


@dataclass(frozen=True, eq=False)
class Principal(Stored):
    """The pca and mean forms; `scale` is the gain."""

    axes: Tensor | None = None

    def put(self, x: Tensor, part: Part = ...) -> None:
        assert self.scale is not None
        assert self.axes is not None
        self.data[part], self.scale[part], self.axes[part] = encode(x.float(), self.form)

    def _wide(self, *tensors: Tensor) -> Tensor:
        data, gain, axes = tensors
        *_, N, D = self.shape
        at, codes = 0, []
        for count, bits in widths_of(D, self.form):
            size = -(-count * bits // 8)
            codes.append(unpacked(data[..., at : at + size], count, bits).float() - (2**bits - 1) / 2)
            at += size
        length = torch.exp2((gain.float() - 128) / 4)
        length = length.masked_fill_(gain == 0, 0).masked_fill_(gain == 255, float("nan"))
        out = (torch.cat(codes, -1) * length) @ axes.float()
        pool = PCA[self.form][3]
        return out if pool == 1 else out.repeat_interleave(pool, 2)[:, :, :N]


def encode(x: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """x float32 [B, H, N, D] -> (data, gain, axes) of a pca form, as the layout has them."""
    widths = widths_of(x.shape[-1], form)
    if (pool := PCA[form][3]) > 1:
        short = -x.shape[2] % pool
        x = F.pad(x, (0, 0, 0, short)).unflatten(2, (-1, pool)).mean(3)
        x[:, :, -1] *= pool / (pool - short)
    # In units of the head's mean length, over rows that have one. Only those that are sane tell what axes are like.
    longest = x.abs().amax(-1, keepdim=True)
    sane = longest.isfinite() & (longest >= TINY)
    unit = (longest.log().masked_fill(~sane, 0).sum(2, keepdim=True) / sane.sum(2, keepdim=True).clamp(min=1)).exp()
    x = (x / unit).masked_fill(~sane, 0).clamp(-FAR, FAR)
    length = x.norm(dim=-1, keepdim=True)
    axes = principal(x * (CLIP / length.clamp(min=CLIP)), sum(count for count, _ in widths))
    x = x @ axes
    gain = (x.norm(dim=-1, keepdim=True).log2() * 4).round().add(128).clamp(0, 254)
    x = x / torch.exp2((gain - 128) / 4)
    weight = torch.exp2((gain - 128) / 4).clamp(max=CLIP).square().masked_fill(gain == 0, 0)
    spread = ((x.square() * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=TINY)).sqrt()
    at, packed, steps = 0, [], []
    for count, bits in widths:
        some, half = slice(at, at + count), 2 ** (bits - 1)
        code = (x[..., some] / (STEPS[bits] * spread[..., some]).clamp(min=TINY)).floor().nan_to_num().clamp(-half, half - 1)
        level = code + 0.5
        fit = (x[..., some] * level * weight).sum(2) / (level.square() * weight).sum(2).clamp(min=TINY)
        packed.append(pack((code + half).to(torch.uint8), bits))
        steps.append(fit)
        at += count
    axes = (axes * torch.cat(steps, -1)[..., None, :] * unit).mT
    return torch.cat(packed, -1), gain.masked_fill(~longest.isfinite(), 255).to(torch.uint8), axes.to(torch.bfloat16)


def principal(x: Tensor, count: int) -> Tensor:
    """x [B, H, N, D] -> about its first `count` principal axes [B, H, D, count], orthonormal, by falling energy.

    By subspace iteration with Cholesky's QR, which unlike an eigenvalue solver runs in batches and waits for nothing."""
    energy = (x.mT @ x).double()
    energy = energy / energy.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=TINY)
    energy = energy + FLOOR * torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)
    # Begin with the channels that have most of it
    first = energy.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)[..., :count]
    axes = torch.zeros(*energy.shape[:-1], count, dtype=torch.float64, device=x.device).scatter_(-2, first[..., None, :], 1.0)
    for _ in range(TURNS):
        axes = energy @ axes
        axes = axes / axes.norm(dim=-2, keepdim=True)
        root, _ = torch.linalg.cholesky_ex(axes.mT @ axes)
        axes = torch.linalg.solve_triangular(root, axes.mT, upper=False).mT
    order = (axes * (energy @ axes)).sum(-2).argsort(dim=-1, descending=True, stable=True)
    return axes.gather(-1, order[..., None, :].expand_as(axes)).to(x.dtype)


def pack(code: Tensor, bits: int) -> Tensor:
    """uint8 codes of 2, 4 or 8 bits [..., n] -> [..., ⌈n · bits / 8⌉], the first in a byte's lowest bits."""
    each = 8 // bits
    code = F.pad(code, (0, -code.shape[-1] % each))
    byte = code[..., ::each]
    for j in range(1, each):
        byte = byte | code[..., j::each] << (j * bits)
    return byte


def unpacked(byte: Tensor, count: int, bits: int) -> Tensor:
    """The first `count` codes, uint8 [..., count]: inverse of `pack`."""
    if bits == 8:
        return byte
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=byte.device)
    return (byte[..., None] >> shift & 2**bits - 1).flatten(-2)[..., :count]
