import pytest
import torch

from fastdit.config import Config, Phase
from fastdit.core.byte_cache import ByteCache
from fastdit.core.layout import Layout
from fastdit.core.quant import Quant
from fastdit.planning.forward_plan import complete, layout_of, plan_call
from fastdit.policies import Dense, HeadProfile, Policy, SpatialTemporal, Window


def plan(config, sigma=0.5, grid=(2, 8, 8), layer=0, text=0, text_first=False, tokens=None, masks=None):
    q = torch.zeros(1, 1, tokens or grid[0] * grid[1] * grid[2] + text, 8)
    others = {"before" if text_first else "after": text}
    return plan_call(config, sigma, grid, q, q, q, layer=layer, layers=4, masks=masks, **others)


def windowed(**overrides):
    return Config(**{"phases": (Phase(policy=Window(size=(1, 1, 1))),), "tile": (1, 4, 4), "min_tokens": 0} | overrides)


def test_sparse():
    masks = ByteCache(1 << 20)
    got = plan(windowed(), masks=masks)
    assert got.reason is None
    assert got.block_mask is not None
    assert got.density == pytest.approx(1 / 8)
    assert plan(windowed(), masks=masks).block_mask is got.block_mask  # made once per layout
    assert plan(windowed()).block_mask is not got.block_mask


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Config(), "the configuration is dense"),
        (windowed(phases=(Phase((1.0, 0.9), Window(size=(1, 1, 1))),)), "no phase for noise level 0.500"),
        (windowed(phases=(Phase(policy=Dense()),)), "the phase is dense"),
        (windowed(min_tokens=129), "128 tokens, the configuration needs 129"),
        (windowed(max_density=0.1), "density 0.12 is above 0.1"),
        (windowed(phases=(Phase(policy=Window(size=(1, 1, 1)), layers=(1, None)),)), "no phase"),
    ],
)
def test_dense_says_why(config, reason):
    got = plan(config)
    assert reason in got.reason
    assert got.block_mask is None
    assert got.density == 1


def test_a_dense_phase_in_a_number_format_is_ours():
    got = plan(windowed(phases=(Phase(policy=Dense(), quant=Quant(qk="int8")),)))
    assert got.reason is None
    assert got.block_mask is None


@pytest.mark.parametrize("text_first", [True, False])
def test_text_and_own_tiles_are_kept_whatever_the_policy_says(text_first):
    layout = Layout((2, 4, 4), (1, 4, 4), text_len=20, text_first=text_first)
    kept = complete(torch.zeros(1, 2, 2, 2, dtype=torch.bool), layout)[0, 1]
    assert kept.tolist() == [[True, False, True, True], [False, True, True, True], [True] * 4, [True] * 4]


def test_a_map_of_the_wrong_shape_is_the_policys_fault():
    with pytest.raises(ValueError, match="a policy must give"):
        complete(torch.ones(1, 1, 3, 3, dtype=torch.bool), Layout((2, 4, 4), (1, 4, 4)))


def test_tiles_are_cut_to_the_grid():
    assert layout_of(Config(tile=(8, 8, 8)), (2, 16, 4)).tile == (2, 8, 4)


def test_a_policy_that_looks_at_the_tensors():
    """The plan hands a dynamic policy the video tokens in tile order, text left out."""

    class Nearest(Policy):
        def select(self, layout, q=None, k=None, v=None):
            assert q.shape == k.shape == (1, 1, layout.video_tiles, layout.tile_tokens, 8)
            assert v is None
            return torch.eye(layout.video_tiles, dtype=torch.bool)[None, None] & (q.sum() == 0)

    got = plan(windowed(phases=(Phase(policy=Nearest()),)), text=5)
    assert got.density == pytest.approx((8 * 16 * 16 + 2 * 5 * 128 + 25) / 133**2)


def test_nothing_is_chosen_where_no_kernel_would_run_it():
    class Never(Policy):
        def select(self, layout, q=None, k=None, v=None):
            raise AssertionError("chosen for nothing")

    q = torch.zeros(1, 1, 128, 8, device="meta")  # like "mps": a device that has no kernel
    got = plan_call(windowed(phases=(Phase(policy=Never()),)), 0.5, (2, 8, 8), q, q, q)
    assert (got.block_mask, got.reason, got.wanting) == (None, "no kernel for meta tensors", True)


def test_a_policy_that_reads_values_gets_them():
    got = plan(windowed(phases=(Phase(policy=SpatialTemporal(density=0.3)),)))
    assert got.reason is None
    assert got.block_mask is not None


def test_first_frame_is_a_sink():
    got = plan(windowed(first_frame=True))
    kept = got.block_mask.to_tile_map()[0, 0]
    assert kept[:, :4].all()  # four tiles of the first frame
    assert torch.equal(kept[4:, 4:], torch.eye(4, dtype=torch.bool))


def test_a_profile_of_other_heads_is_refused():
    profile = HeadProfile((Window(size=(1, 1, 1)), Dense()), (0, 1))
    with pytest.raises(ValueError, match="for 2 heads, this layer has 1"):
        plan(windowed(phases=(Phase(policy=profile),)))


def test_remainder_of_the_phase():
    assert plan(windowed(phases=(Phase(policy=Window(size=(1, 1, 1)), remainder="pooled"),))).remainder == "pooled"
