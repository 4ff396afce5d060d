"""Small pipelines of real classes, prompt to pictures: exact is stock to the bit, a window runs and is told, all is undone."""

import pytest
import torch
from util import tiny_flux_pipeline, tiny_wan_pipeline

import fastdit
from fastdit import Config, Phase, Window
from fastdit.core.reference import relative_error

WINDOW = Config((Phase((1.0, 0.9)), Phase((0.9, 0.0), Window(size=(1, 1, 1)))), (1, 2, 2), min_tokens=0, max_density=1)


def video(pipe):
    return pipe(
        "a red circle", negative_prompt="a", num_frames=9, height=64, width=64, num_inference_steps=4, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip


def image(pipe):
    return pipe(
        "a red circle", height=64, width=64, num_inference_steps=4, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images


@pytest.mark.parametrize(("make", "draw"), [(tiny_wan_pipeline, video), (tiny_flux_pipeline, image)], ids=["Wan", "Flux"])
def test_from_prompt_to_pictures(make, draw):
    pipe = make()
    stock = draw(pipe)
    with fastdit.accelerate(pipe, "exact"):
        assert torch.equal(draw(pipe), stock)
    with fastdit.accelerate(pipe, WINDOW):
        windowed = draw(pipe)
        report = fastdit.report(pipe)
    assert windowed.isfinite().all()
    assert relative_error(windowed, stock) > 1e-4
    assert {site.ran for site in report.sites} == {"mixed"}
    assert 0 < report.density < 1
    assert "window" in str(report)
    assert torch.equal(draw(pipe), stock)
