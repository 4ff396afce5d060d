"""Masks of whole keys are recognised, and only those."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit.planning import key_padding

LENGTH = 12
VALID = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
RUNS = (((0, 7),), ((0, 2), (4, 12)))


def additive(mask, low, dtype=torch.float32):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, low)


@pytest.mark.parametrize(
    "mask",
    [
        VALID[:, None, None],
        VALID[:, None, None].expand(2, 3, LENGTH, LENGTH),
        VALID[:, None, None].expand(2, 3, LENGTH, LENGTH).clone(),
        additive(VALID[:, None, None], float("-inf")),
        additive(VALID[:, None, None], -10000.0, torch.bfloat16),
        additive(VALID[:, None, None], torch.finfo(torch.float16).min, torch.float16),
    ],
    ids=["row", "expanded", "whole", "-inf", "-10000 in bfloat16", "least float16"],
)
def test_masks_of_keys(mask):
    found = key_padding.read(mask, 2, LENGTH, LENGTH)
    assert found == key_padding.KeptKeys(RUNS, square=False)


@pytest.mark.parametrize("low", [None, float("-inf")], ids=["bool", "additive"])
def test_what_is_only_repeated_is_looked_at_once(low):
    """A mask of keys, expanded over heads and queries as SDPA wants it: nothing of N × N is computed."""
    mask = VALID[:, None, None] if low is None else additive(VALID[:, None, None], low)

    class Most(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != mask.untyped_storage().data_ptr():
                self.seen = max(self.seen, out.numel())
            return out

    expanded = mask.expand(2, 3, LENGTH, LENGTH)
    with Most() as most:
        assert key_padding.read(expanded, 2, LENGTH, LENGTH) == key_padding.KeptKeys(RUNS, square=False)
    assert most.seen <= 2 * LENGTH


def test_a_mask_that_was_changed_is_read_again():
    """Also where PyTorch counts no change: of a compiled model's buffers, and in inference mode."""
    mask = VALID[:, None, None].clone()
    assert key_padding.read(mask, 2, LENGTH, LENGTH).kept == RUNS
    mask.data[1] = VALID[0]
    assert key_padding.read(mask, 2, LENGTH, LENGTH).kept == RUNS[:1] * 2


def test_square_mask_hides_queries_too():
    square = VALID[:, None, None] & VALID[:, None, :, None]
    assert key_padding.read(square, 2, LENGTH, LENGTH) == key_padding.KeptKeys(RUNS, square=True)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None],
        torch.randn(1, 1, LENGTH, LENGTH),
        additive(VALID[:, None, None], -3.0),
        torch.stack([VALID, ~VALID], 1)[:, :, None],
        torch.zeros(2, 1, 1, LENGTH, dtype=torch.bool),
    ],
    ids=["causal", "bias", "soft", "by head", "nothing left"],
)
def test_others_are_left_to_the_original(mask):
    assert key_padding.read(mask, 2, LENGTH, LENGTH) is None


def test_why_a_mask_is_left():
    valid = VALID[:, None, None]
    assert "more than whole keys" in key_padding.why_not(torch.ones(4, 4, dtype=torch.bool).tril())
    assert "adds to the logits" in key_padding.why_not((valid & valid.mT).float())  # as ChromaPipeline passes its own


def test_one_mask_serves_the_batch():
    assert key_padding.read(VALID[:1, None, None], 3, LENGTH, LENGTH).kept == RUNS[:1] * 3


def test_take_and_put_are_inverse():
    x = torch.randn(1, LENGTH, 2, 4)
    out = torch.zeros_like(x)
    key_padding.scatter_runs(out, key_padding.gather_runs(x, RUNS[1]), RUNS[1])
    key_padding.scatter_runs(
        out, key_padding.gather_runs(x, key_padding.gaps(RUNS[1], LENGTH)), key_padding.gaps(RUNS[1], LENGTH)
    )
    assert torch.equal(out, x)
    assert key_padding.count(RUNS[1]) == 10
    assert key_padding.count(RUNS[1], 1, 5) == 2


def test_no_runs_take_nothing():
    """What a row without padding hides."""
    x = torch.randn(2, LENGTH, 2, 4)
    assert key_padding.gaps(((0, LENGTH),), LENGTH) == ()
    nothing = key_padding.gather_runs(x, ())
    assert nothing.shape == (2, 0, 2, 4)
    assert (nothing.dtype, nothing.device) == (x.dtype, x.device)
    out = x.clone()
    key_padding.scatter_runs(out, nothing, ())
    assert torch.equal(out, x)
    assert key_padding.count(()) == 0
    assert key_padding.gaps((), LENGTH) == ((0, LENGTH),)


PICTURE, TEXT = 6, 4
USED = (0, 2, TEXT)
"""Text tokens of a row: none (only the picture is left), some, all."""


def trimmed(q, k, v, mask):
    """Masked attention [B, N, H, D] row by row, by nothing but `trim` and dense attention."""

    def dense(*qkv):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)

    keys = key_padding.read(mask, *q.shape[:2], k.shape[1])
    out = torch.full_like(q, float("nan"))
    for row, runs in enumerate(keys.kept):
        query, key, value = (x[row : row + 1] for x in (q, k, v))
        hidden = key_padding.gaps(runs, q.shape[1])
        left = key_padding.gather_runs(key, runs), key_padding.gather_runs(value, runs)
        key_padding.scatter_runs(out[row : row + 1], dense(key_padding.gather_runs(query, runs), *left), runs)
        others = key_padding.gather_runs(query, hidden)
        key_padding.scatter_runs(out[row : row + 1], torch.zeros_like(others) if keys.square else dense(others, *left), hidden)
    return out


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("square", [False, True], ids=["keys", "square"])
@pytest.mark.parametrize("text", ["behind", "before"])
def test_every_combination_of_rows(batch, square, text):
    """Prompts of any lengths in one batch, also without padding and without text, against the masked attention meant."""
    generator = torch.Generator().manual_seed(batch)
    length = PICTURE + TEXT
    q, k, v = (torch.randn(batch, length, 2, 8, generator=generator) for _ in range(3))
    for used in product(USED, repeat=batch):
        words = torch.arange(TEXT) < torch.tensor(used)[:, None]
        picture = torch.ones(batch, PICTURE, dtype=torch.bool)
        valid = torch.cat([picture, words] if text == "behind" else [words, picture], 1)
        mask = valid[:, None, None] & valid[:, None, :, None] if square else valid[:, None, None]
        expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
        if square:
            expected = expected.masked_fill(~valid[..., None, None], 0)
        assert torch.allclose(trimmed(q, k, v, mask), expected, atol=1e-6), used
