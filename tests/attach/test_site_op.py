"""The op of a site by PyTorch's own rules, compiled by Inductor at each seam, and that no forward walks its modules."""

import pytest
import torch
from chequer import SPARSE
from families import BY_NAME, run
from models import wan, wan_inputs
from torch import nn
from util import enter

import fastdit
from fastdit.attach.processor import installed
from fastdit.attach.site_op import _site_attention
from fastdit.core.reference import relative_error

GRID = (3, 8, 8)


@pytest.mark.parametrize("config", ["exact", SPARSE], ids=["exact", "sparse"])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_in_full(config, masked):
    """Schema, autograd registration, the fake kernel's shapes and strides, and AOTAutograd with sizes that vary."""
    model = wan()
    fastdit.accelerate(model, config)
    denoiser = installed(model)
    forward = enter(denoiser, GRID)
    q, k, v = torch.randn(3, 2, 192, 2, 64, generator=torch.Generator().manual_seed(0)).unbind()
    mask = torch.ones(2, 1, 1, 192, dtype=torch.bool) if masked else None
    layer = model.blocks[0].attn1.processor.layer
    for compiled in (False, True):
        given = (q, k, v, mask, denoiser.call.token, layer, None, None, "native", compiled)
        torch.library.opcheck(_site_attention, given)
    del forward
    assert fastdit.report(model).sites[0].ran == ("dense" if config == "exact" else "sparse")


@pytest.mark.parametrize("family", ["CogVideoX", "SD3"])
@torch.no_grad()
def test_compiled_by_inductor(family):
    """Where attention is PyTorch's function, and two in one block; where it is diffusers' dispatch, test_processor.py does."""
    torch._dynamo.reset()
    case = BY_NAME[family]
    model = case.model()
    fastdit.accelerate(model, SPARSE)
    eager = run(model, case)
    compiled = run(torch.compile(model, fullgraph=True), case)
    assert relative_error(compiled, eager) < 1e-5
    report = fastdit.report(model)
    assert sum(site.ran == "sparse" for site in report.sites) == case.sites
    assert report.density < 1


@pytest.mark.parametrize("config", ["exact", SPARSE], ids=["exact", "sparse"])
@torch.no_grad()
def test_a_forward_does_not_walk_its_modules(config, monkeypatch):
    """No more than stock does: a walk over a large model costs milliseconds."""
    walked, walk = [], nn.Module.named_modules
    monkeypatch.setattr(nn.Module, "named_modules", lambda self, *a, **k: walked.append(self) or walk(self, *a, **k))
    model = wan()
    list(model.modules())
    assert walked, "`modules` walks by this too"
    walked.clear()
    model(**wan_inputs(GRID))
    stock = len(walked)
    fastdit.accelerate(model, config)
    model(**wan_inputs(GRID))
    walked.clear()
    model(**wan_inputs(GRID, sigma=0.4))
    assert len(walked) == stock
