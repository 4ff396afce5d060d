"""`enable_parallelism` on two real processes (gloo): split over heads or in a ring, attention is what one process computes."""

import os
import subprocess
import sys

import pytest
import torch
from chequer import SPARSE
from diffusers import ContextParallelConfig, ParallelConfig
from families import BY_NAME, run
from ranks import CASES, call
from util import ROOT, environment

import fastdit
from fastdit import ops
from fastdit.attach.context_parallel import _interleaved, _own, _taken, refusal, tokens
from fastdit.attach.handle import Denoiser
from fastdit.attach.processor import installed
from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.reference import attention, relative_error, token_mask
from fastdit.planning.adapter import Facts


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What both processes saw, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    tests = ROOT / "tests"
    seen = environment(PYTHONPATH=os.pathsep.join((str(tests), str(ROOT), os.environ.get("PYTHONPATH", ""))))
    programs = [[sys.executable, str(tests / "ranks.py"), str(rank), str(folder)] for rank in range(2)]
    processes = [subprocess.Popen(program, env=seen, stderr=subprocess.PIPE, text=True) for program in programs]
    try:
        for process in processes:
            _, said = process.communicate(timeout=900)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("pair", CASES, ids=" ".join)
def test_two_processes_are_one(both, pair):
    family, split = pair
    case, changed = BY_NAME[family], call(*pair)
    model = case.model()
    with torch.no_grad():
        stock = run(model, case, **changed)
        with fastdit.accelerate(model, SPARSE):
            sparse = run(model, case, **changed)
    assert relative_error(sparse, stock) > 2e-5
    for rank in both:
        result = rank[pair]
        if split.startswith("ulysses"):
            assert relative_error(result["stock"], stock) < 1e-5  # diffusers itself
        else:
            assert isinstance(result["stock"], str)  # its CPU backend has no ring: ours does not need one
        assert relative_error(result["exact"], stock) < 1e-5
        assert relative_error(result["sparse"], sparse) < 1e-5
        assert {ran for ran, _, _ in result["sparse report"]} == {"sparse"}, result["sparse report"]
        assert all(density < 1 for _, _, density in result["sparse report"])


@pytest.mark.parametrize(
    ("split", "mask", "text", "why"),
    [
        ({"ring_degree": 2, "ulysses_degree": 2}, None, 0, "by ring and Ulysses at once"),
        ({"ring_degree": 2}, torch.ones(1, 1, 1, 8, dtype=torch.bool), 0, "by a ring, with a mask"),
        ({"ulysses_degree": 2}, None, 5, "text and picture in one piece"),
    ],
)
def test_what_stays_with_diffusers(split, mask, text, why):
    """Text in the sequence that no hook splits, as diffusers' own plans do: nobody knows the order of the tokens then."""
    model = BY_NAME["HunyuanVideo"].model()
    fastdit.accelerate(model, SPARSE)
    denoiser = installed(model)
    denoiser.call.facts = Facts((2, 2, 2), torch.tensor(0.5), after=text)
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(**split))
    assert why in refusal(denoiser, config, mask)


def test_gathered_places():
    """Text of 5 and a picture of 4 on two processes: text₀ picture₀ text₁ picture₁, the first process one text token more."""
    token, order = _interleaved(5, 4, 2, torch.device("cpu"))
    assert token.tolist() == [0, 1, 2, 5, 6, 3, 4, 7, 8]
    assert token[order].tolist() == order[token].tolist() == list(range(9))


def test_nothing_is_moved_where_nothing_is_out_of_order():
    """A model without text in its sequence: no gather of q, k, v and out; with it the places are made once, on the device."""
    denoiser = Denoiser("model", None, None, lambda: None)
    facts = denoiser.call.facts = Facts((2, 3, 4), torch.tensor(0.5))
    cpu = torch.device("cpu")
    assert tokens(denoiser, 24, 2, cpu) == (None, None)
    x = torch.zeros(1, 24, 2, 8)
    assert _taken(x, None) is x
    assert _own(None, 12, 12, cpu).tolist() == list(range(12, 24))
    denoiser.call.facts = facts._replace(before=4)
    token, order = tokens(denoiser, 28, 2, cpu)
    again = tokens(denoiser, 28, 2, cpu)
    assert again[0] is token
    assert again[1] is order
    assert _own(token, 14, 14, cpu).tolist() == [2, 3, *range(16, 28)]
    assert _own(token, 14, 14, cpu) is _own(token, 14, 14, cpu)
    with torch.device("meta"):
        assert tokens(denoiser, 30, 2, cpu)[0].device == cpu


def test_block_masks_of_some_queries():
    layout = Layout((3, 5, 6), (1, 3, 4), text_len=4, text_first=True)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(1, 2, layout.num_tiles, layout.num_tiles, generator=generator) < 0.4
    at = torch.randperm(layout.length, generator=generator)[:37]
    q, k, v = (torch.randn(1, 2, layout.length, 16, generator=generator) for _ in range(3))
    out, lse = ops.attention(q[:, :, at], k, v, BlockMask.from_tile_map(kept, layout).for_queries(at))
    expected, expected_lse = attention(q, k, v, token_mask(layout, kept))
    assert relative_error(out, expected[:, :, at]) < 1e-5
    assert torch.equal(lse.isneginf(), expected_lse[:, :, at].isneginf())
