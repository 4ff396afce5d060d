"""Forms of a remembered residual: their values against the layout read a second time, their bytes, and what hurts them."""

import math

import numpy as np
import pytest
import torch
from util import Largest

from fastdit.approx import residual_store
from fastdit.approx.residual_store import FORMS, PCA, Stored, bytes_of, pack, parts, unpacked, widths_of
from fastdit.config import AUTO, Reuse

SHAPES = [(1, 1, 1, 1), (1, 2, 5, 3), (2, 3, 50, 7), (1, 2, 33, 64), (2, 1, 100, 40), (1, 1, 16, 128)]


def smooth(shape, seed=0):
    """Rows as a residual's are: near few directions, alike from token to token, of uneven lengths."""
    generator = torch.Generator().manual_seed(seed)
    B, H, N, D = shape
    walk = torch.randn(B, H, N, D, generator=generator).cumsum(2) + 4 * torch.randn(B, H, N, D, generator=generator)
    spread = torch.linspace(0, -3, D).exp()
    turn, _ = torch.linalg.qr(torch.randn(B, H, D, D, generator=generator))
    return (walk * spread) @ turn * torch.rand(B, H, N, 1, generator=generator).mul(3).exp()


def error(found, x):
    return float((found.double() - x.double()).norm() / x.double().norm())


def read(stored):
    """As the docstring of the module says, value by value in float64."""
    B, H, N, D = stored.shape
    out = np.zeros(stored.shape)
    data = stored.data.float().numpy() if stored.form in ("float32", "bfloat16", "fp8") else stored.data.numpy()
    scale = None if stored.scale is None else stored.scale.double().numpy()
    for b, h, i in np.ndindex(B, H, N):
        if stored.form == "int4":
            for d in range(D):
                byte = int(data[b, h, i, d // 2])
                out[b, h, i, d] = ((byte >> 4 if d % 2 else byte & 15) - 8) * scale[b, h, i, 0]
        elif stored.form in PCA:
            j = i // PCA[stored.form][3]
            gain, at, r = int(stored.scale[b, h, j, 0]), 0, 0
            length = 0.0 if gain == 0 else math.nan if gain == 255 else 2.0 ** ((gain - 128) / 4)
            for count, bits in widths_of(D, stored.form):
                for n in range(count):
                    byte = int(data[b, h, j, at + n * bits // 8])
                    code = byte >> n * bits % 8 & 2**bits - 1
                    out[b, h, i] += length * (code - (2**bits - 1) / 2) * stored.axes[b, h, r].double().numpy()
                    r += 1
                at += -(-count * bits // 8)
        else:
            out[b, h, i] = data[b, h, i] * (1 if scale is None else scale[b, h, i, 0])
    return torch.from_numpy(out)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_loaded_is_what_the_layout_says(form, shape):
    x = smooth(shape)
    stored = Stored.of(x, form)
    expected = read(stored)
    assert (stored.load(x).double() - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert stored.load(x.double()).dtype == (torch.float64 if not stored.as_is else stored.data.dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_exact(form, shape):
    stored = Stored.of(smooth(shape), form)
    B, H, N, D = shape
    rows = B * H * N
    if form in PCA:
        eighths, quarters, pairs, pool = PCA[form]
        wide = min(D, math.ceil(eighths * D / 32))
        middle = min(D - wide, math.ceil(quarters * D / 32))
        narrow = min(D - wide - middle, math.ceil(pairs * D / 32))
        row = wide + math.ceil(middle / 2) + math.ceil(narrow / 4) + 1
        expected = B * H * (math.ceil(N / pool) * row + 2 * D * (wide + middle + narrow))
    else:
        expected = {
            "float32": 4 * rows * D,
            "bfloat16": 2 * rows * D,
            "fp8": rows * (D + 4),
            "int4": rows * ((D + 1) // 2 + 2),
        }[form]
    assert stored.bytes() == bytes_of(shape, form) == sum(x.nbytes for x in stored.tensors) == expected
    assert all(x.is_contiguous() for x in stored.tensors)


@pytest.mark.parametrize(
    ("form", "share"), [("pca4", 1 / 4), ("pca2", 1 / 8), ("pca1", 1 / 16), ("mean4", 1 / 64), ("mean16", 1 / 256)]
)
def test_shares_of_bfloat16_at_720p(form, share):
    shape = (1, 40, 75600, 128)
    assert share / 1.4 < bytes_of(shape, form) / bytes_of(shape, "bfloat16") <= share


def coder(x, form):
    """Transform coding of [N, D] in float64 with exact axes, every row's own length and the best of many steps: what a pca form
    aims at, written without it."""
    x = x.double().numpy()
    _, axes = np.linalg.eigh(x.T @ x)
    c = x @ axes[:, ::-1]
    at, out = 0, np.zeros_like(c)
    length = np.linalg.norm(c, axis=1, keepdims=True)
    for count, bits in widths_of(x.shape[1], form):
        for r in range(at, at + count):
            u = c[:, r] / length[:, 0]
            best = math.inf
            for step in np.geomspace(0.01, 2, 60) * np.abs(u).mean():
                level = np.clip(np.floor(u / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5
                found = level * length[:, 0]
                found = found * (found @ c[:, r]) / (found @ found)
                if (wrong := np.square(found - c[:, r]).sum()) < best:
                    best, out[:, r] = wrong, found
        at += count
    return float(np.linalg.norm(out - c) / np.linalg.norm(c))


@pytest.mark.parametrize("form", ["pca4", "pca2", "pca1"])
def test_axes_and_steps_are_near_the_best(form):
    x = smooth((1, 1, 800, 64), 3)
    assert error(Stored.of(x, form).load(x), x) < 1.1 * coder(x[0, 0], form)


def test_int4_is_the_nearest_of_fifteen_levels():
    x = smooth((1, 2, 40, 9))
    stored = Stored.of(x, "int4")
    scale = stored.scale.double()
    largest = x.double().abs().amax(-1, keepdim=True)
    assert ((scale * 7 / largest - 1).abs() <= 2**-8).all()
    levels = scale[..., None] * torch.arange(-7, 8)
    nearest = (x.double()[..., None] - levels).abs().min(-1).values
    assert torch.allclose((stored.load(x).double() - x.double()).abs(), nearest, rtol=1e-3, atol=1e-6 * float(largest.max()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_and_strides(form, dtype):
    """What lies as [B, N, H, D], or every second value of something, gives the same."""
    x = smooth((2, 3, 50, 20)).to(dtype) / 8
    expected = Stored.of(x.contiguous(), form).load(x)
    wide = torch.full((2, 50, 3, 40), math.nan, dtype=dtype)
    wide[..., ::2] = x.transpose(1, 2)
    for other in (x.transpose(1, 2).contiguous().transpose(1, 2), wide[..., ::2].transpose(1, 2)):
        assert error(Stored.of(other, form).load(x), expected) < 1e-5
    assert torch.equal(Stored.of(x.clone(), form).load(x), expected)


@pytest.mark.parametrize("form", FORMS)
def test_parts_come_in_any_order(form, monkeypatch):
    x = smooth((2, 4, 50, 24))
    monkeypatch.setattr(residual_store, "PART_BYTES", 4 * 2 * 50 * 24)
    pieces = list(parts(x))
    assert len(pieces) == 4
    one, two = Stored.empty(x, form, False), Stored.empty(x, form, False)
    for piece in pieces:
        one.put(x[piece], piece)
    for piece in reversed(pieces):
        two.put(x[piece], piece)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors, two.tensors, strict=True))
    for piece in pieces:
        assert torch.equal(one.load(x, piece), one.load(x)[piece])
    assert error(Stored.of(x, form).load(x), one.load(x)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_no_copy_of_the_whole_is_made(form, monkeypatch):
    x = smooth((1, 16, 64, 32)).bfloat16()
    monkeypatch.setattr(residual_store, "PART_BYTES", 4 * 64 * 32)
    stored = Stored.empty(x, form, False)
    with Largest() as largest:
        for piece in parts(x):
            stored.put(x[piece], piece)
            stored.load(x, piece)
    assert largest.seen <= 64 * 32


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_not_finite_stays_alone(form):
    x = smooth((1, 2, 64, 32))
    bad = x.clone()
    bad[0, 0, 5, 3], bad[0, 0, 40] = math.nan, math.inf
    pool = PCA.get(form, (1,))[-1]
    touched = torch.zeros(64, dtype=torch.bool)
    for i in (5, 40):
        touched[i // pool * pool : i // pool * pool + pool] = True
    found = Stored.of(bad, form).load(x).float()
    broken = ~found.isfinite().all(-1)
    assert not broken[0, 1].any()
    assert torch.equal(broken[0, 0], touched)
    assert error(found[0, 0, ~touched], x[0, 0, ~touched]) < 1.5 * error(Stored.of(x, form).load(x), x) + 1e-6
    assert torch.equal(found[0, 1], Stored.of(x, form).load(x)[0, 1].float())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("times", [1e2, 1e8, 1e20])
def test_a_row_that_stands_out_does_not_spoil_the_others(form, times):
    x = smooth((1, 1, 2048, 32))
    if form.startswith("mean"):
        x = x.unflatten(2, (-1, 16)).mean(3, keepdim=True).expand(-1, -1, -1, 16, -1).flatten(2, 3).contiguous()
    spiked = x.clone()
    spiked[0, 0, 7] *= times
    pool = PCA.get(form, (1,))[-1]
    others = torch.arange(2048) // pool != 7 // pool
    before = error(Stored.of(x, form).load(x)[:, :, others], x[:, :, others])
    found = Stored.of(spiked, form).load(x).float()
    assert error(found[:, :, others], x[:, :, others]) < 1.5 * before + 1e-6
    if pool == 1:
        assert (found[0, 0, 7] - spiked[0, 0, 7]).norm() <= 1.1 * spiked[0, 0, 7].norm()


@pytest.mark.parametrize("form", FORMS)
def test_zeros_constants_and_scales(form):
    x = smooth((1, 2, 48, 32))
    assert Stored.of(torch.zeros_like(x), form).load(x).eq(0).all()
    some = x.clone()
    some[0, 0, 16:32], some[0, 1] = 0, 0
    found = Stored.of(some, form).load(x).float()
    assert found[0, 1].eq(0).all()
    assert found[0, 0, 16:32].eq(0).all()
    constant = x[:, :, :1].expand(-1, -1, 48, -1)
    assert error(Stored.of(constant, form).load(x), constant) < {"fp8": 0.04, "int4": 0.2}.get(form, 0.01)
    expected = error(Stored.of(x, form).load(x), x)
    for scale in (1e-30, 1e-6, 1e6, 1e30):
        assert error(Stored.of(x * scale, form).load(x), x * scale) < 1.1 * expected + 1e-6


@pytest.mark.parametrize("form", ["int4", *PCA])
def test_no_row_is_worse_than_forgotten(form):
    """But rows of a mean, which may be farther from it than from 0."""
    x = torch.randn(2, 2, 300, 24, generator=torch.Generator().manual_seed(0))
    found = Stored.of(x, form).load(x)
    worst = ((found - x).norm(dim=-1) / x.norm(dim=-1)).max()
    assert worst < {"int4": 0.25}.get(form, 1.05) or PCA[form][3] > 1
    assert error(found, x) < 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", FORMS)
def test_from_one_form_to_another(form, other):
    x = smooth((1, 2, 64, 32))
    found = Stored.of(x, form).to(other, x.device)
    assert found.form == other
    both = error(Stored.of(x, form).load(x), x) + error(Stored.of(x, other).load(x), x)
    assert error(found.load(x), x) < 1.05 * both + 1e-6


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 9])
def test_codes_are_packed_from_the_lowest_bits(bits, count):
    code = (torch.arange(count) * 7 % 2**bits).to(torch.uint8)
    byte = pack(code[None], bits)
    assert byte.shape == (1, -(-count * bits // 8))
    number = sum(int(x) << 8 * i for i, x in enumerate(byte[0]))
    assert [number >> bits * i & 2**bits - 1 for i in range(count)] == code.tolist()
    assert torch.equal(unpacked(byte, count, bits)[0], code)


@pytest.mark.parametrize("store", [*FORMS, AUTO])
def test_names_go_through_a_dictionary(store):
    reuse = Reuse("residual", store=store)
    assert Reuse.from_dict(reuse.to_dict()) == reuse


def test_forms_that_are_none_are_refused():
    with pytest.raises(ValueError, match="pca4"):
        Stored.empty(torch.zeros(1, 1, 2, 2), "pca3", False)
    with pytest.raises(ValueError, match=r"\[B, H, N, D\]"):
        Stored.empty(torch.zeros(2, 2), "pca4", False)
    with pytest.raises(ValueError, match="pca4"):
        Reuse("residual", store="int3")
