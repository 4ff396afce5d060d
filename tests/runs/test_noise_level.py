"""The noise level is the scheduler's own: for every scheduler of diffusers, known to us or used by somebody's own loop."""

import inspect
from itertools import pairwise

import diffusers.schedulers
import pytest
import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from models import Pipe

import fastdit
from fastdit import Config, Phase, Window
from fastdit.runs.noise_level import Scale

NOT_OF_NOISE = {
    "AmusedScheduler": "unmasks tokens",
    "BlockRefinementScheduler": "unmasks tokens",
    "DiscreteDDIMScheduler": "of tokens",
    "EntropyBoundScheduler": "unmasks tokens",
    "VQDiffusionScheduler": "of tokens",
    "RFD4ProteinaScheduler": "of proteins",
}
OF_FLOWS = {
    "HeliosScheduler": "needs its pipeline's stages",
    "HeliosDMDScheduler": "needs its pipeline's stages",
    "MiniMaxH3Scheduler": "its timestep counts up: its family reads it",
}
STEPS = {"ConsistencyDecoderScheduler": 2, "SCMScheduler": 2}
RISING = ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler")
OWN_STEPS = ("KarrasVeScheduler",)
"""Their timesteps count the run's steps, which only the scheduler tells."""
CLASSES = {name: getattr(diffusers.schedulers, name) for name in dir(diffusers.schedulers)}  # which imports them
ALL = sorted(
    name
    for name, cls in CLASSES.items()
    if inspect.isclass(cls) and issubclass(cls, SchedulerMixin) and cls is not SchedulerMixin
)
SPARSE = Config((Phase(policy=Window(size=(1, 1, 1))),), (1, 2, 2), min_tokens=0, max_density=1)
TEXT = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def unet():
    """One level of blocks and no middle: of its answers only the noise level is looked at."""
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        attention_head_dim=2,
    ).eval()  # fmt: skip


def levels(model, scheduler):
    """Noise levels in the report of a run by hand, a step each."""
    with torch.no_grad():
        for i, timestep in enumerate(scheduler.timesteps):
            x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) + 0.01 * i
            model(x, timestep, TEXT, return_dict=False)
    calls = fastdit.report(model).calls
    return [ran.sigma for site, ran in calls if site == 0]


@pytest.mark.parametrize("known", ["known", "unknown"])
@pytest.mark.parametrize("name", [name for name in ALL if name not in NOT_OF_NOISE | OF_FLOWS])
def test_every_scheduler(unet, name, known):
    if known == "unknown" and name in OWN_STEPS:
        pytest.skip("counts its own steps: only the scheduler tells of how many")
    scheduler = CLASSES[name]()
    scheduler.set_timesteps(STEPS.get(name, 10))
    pipe = Pipe(unet, scheduler)
    fastdit.accelerate(pipe if known == "known" else unet, SPARSE)
    found = levels(unet, scheduler)
    fastdit.restore(unet)
    assert len(found) == len(scheduler.timesteps)
    if name in RISING:
        found.reverse()
    assert all(after <= before + 1e-5 for before, after in pairwise(found))
    assert found[0] >= 0.89
    if name not in STEPS:
        assert found[-1] <= 0.22


def test_the_table_is_whole():
    assert set(NOT_OF_NOISE) | set(OF_FLOWS) <= set(ALL) or diffusers.__version__.startswith("0.37")


@pytest.mark.parametrize(
    ("scheduler", "first", "timestep", "level"),
    [
        (None, 999.0, 500.0, 0.5),
        (None, 0.0, 900.0, 0.9),  # an inversion begins at 0
        (None, 1.0954, 0.25 * torch.tensor(80.0).log().item(), 80 / 81),  # EDM: c_noise = ln σ / 4
        (None, 1.0954, 0.0, 0.5),
        (None, 1.0, 0.25, 0.25),
        (None, 1095.5, 0.0, 0.5),  # consistency models
        (diffusers.EDMEulerScheduler, -1.0, -1.0, 1 / (1 + 2.718281828**4)),  # a run that begins late
    ],
)
def test_scales(scheduler, first, timestep, level):
    if scheduler is not None:
        scheduler = scheduler()
        scheduler.set_timesteps(10)
    assert Scale.of(scheduler, first)(timestep) == pytest.approx(level, abs=1e-4)
