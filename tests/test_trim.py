"""Masks of whole keys are recognised, and only those."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import trim

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
    found = trim.read(mask, 2, LENGTH, LENGTH)
    assert found == trim.Keys(RUNS, square=False)


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
        assert trim.read(expanded, 2, LENGTH, LENGTH) == trim.Keys(RUNS, square=False)
    assert most.seen <= 2 * LENGTH


def test_a_mask_that_was_changed_is_read_again():
    """Also where PyTorch counts no change: of a compiled model's buffers, and in inference mode."""
    mask = VALID[:, None, None].clone()
    assert trim.read(mask, 2, LENGTH, LENGTH).kept == RUNS
    mask.data[1] = VALID[0]
    assert trim.read(mask, 2, LENGTH, LENGTH).kept == RUNS[:1] * 2


def test_square_mask_hides_queries_too():
    square = VALID[:, None, None] & VALID[:, None, :, None]
    assert trim.read(square, 2, LENGTH, LENGTH) == trim.Keys(RUNS, square=True)


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
    assert trim.read(mask, 2, LENGTH, LENGTH) is None


def test_why_a_mask_is_left():
    valid = VALID[:, None, None]
    assert "more than whole keys" in trim.why_not(torch.ones(4, 4, dtype=torch.bool).tril())
    assert "adds to the logits" in trim.why_not((valid & valid.mT).float())  # as ChromaPipeline passes its own


def test_one_mask_serves_the_batch():
    assert trim.read(VALID[:1, None, None], 3, LENGTH, LENGTH).kept == RUNS[:1] * 3


def test_take_and_put_are_inverse():
    x = torch.randn(1, LENGTH, 2, 4)
    out = torch.zeros_like(x)
    trim.put(out, trim.take(x, RUNS[1]), RUNS[1])
    trim.put(out, trim.take(x, trim.gaps(RUNS[1], LENGTH)), trim.gaps(RUNS[1], LENGTH))
    assert torch.equal(out, x)
    assert trim.count(RUNS[1]) == 10
    assert trim.count(RUNS[1], 1, 5) == 2
