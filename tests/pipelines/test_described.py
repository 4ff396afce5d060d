"""`fastdit.install`: denoisers that fastdit does not know, described by their owner."""

import pytest
import torch
from chequer import SPARSE, Chequer, token_mask
from models import GRID, TEXT, given, layout, wan, wan_inputs
from torch import nn

import fastdit
from fastdit import Config, Phase
from fastdit.attach.processor import BoundProcessor, installed
from fastdit.core.reference import relative_error


def test_an_own_denoiser(mine, monkeypatch):
    stock = mine(*given())
    fastdit.install(mine, layout, SPARSE, skip={"look": "looks at the text"})
    sparse = mine(*given())
    report = fastdit.report(mine)
    assert [(site.name, site.ran) for site in report.sites] == [("mix.0", "sparse"), ("mix.1", "sparse")]
    assert "looks at the text" in str(report)
    fastdit.restore(mine)
    assert torch.equal(mine(*given()), stock)

    kept, dense = token_mask(GRID, TEXT, 0), torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention",
        lambda q, k, v, attn_mask=None, **more: dense(q, k, v, kept if q.shape == k.shape else attn_mask, **more),
    )  # fmt: skip
    expected = mine(*given())
    assert relative_error(stock, expected) > 1e-3
    assert relative_error(sparse, expected) < 1e-5


def test_phases_and_text_follow_the_call(mine):
    fastdit.install(
        mine, layout, Config((Phase((1.0, 0.5)), Phase((0.5, 0.0), Chequer())), (1, 4, 4), min_tokens=0, max_density=1)
    )
    for percent, ran in ((80.0, "dense"), (20.0, "mixed")):
        mine(*given(percent))
        assert fastdit.report(mine).sites[0].ran == ran
    call = installed(mine).call.forward
    assert (call.plan.sequence.grids, call.plan.sequence.before) == ((GRID,), TEXT)


def test_compiled_it_is_one_graph(mine):
    torch._dynamo.reset()
    fastdit.install(mine, layout, SPARSE)
    eager = [mine(*given(percent)) for percent in (50.0, 20.0)]
    compiled = torch.compile(mine, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*given()), eager[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(*given(20.0)), eager[1])


def test_another_configuration_keeps_the_description(mine):
    fastdit.install(mine, layout, "exact")
    fastdit.accelerate(mine, SPARSE)
    mine(*given())
    assert fastdit.report(mine).density < 1


def test_a_layout_that_is_wrong_stays_dense_and_says_so(mine):
    stock = mine(*given())
    with fastdit.install(mine, lambda call: layout(call)._replace(before=0), SPARSE):
        assert torch.equal(mine(*given()), stock)
        assert "197 tokens where the denoiser's input makes 192" in fastdit.report(mine).sites[0].reason
    assert not any(isinstance(getattr(module, "processor", None), BoundProcessor) for module in mine.modules())


class Wrapper(nn.Module):
    """Somebody's own class around the same blocks, called as Wan is."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, hidden_states, timestep, **more):
        return self.inner(hidden_states, timestep, **more)


def test_like_a_known_class():
    known, model = wan(), Wrapper(wan())
    with torch.no_grad(), fastdit.accelerate(known, SPARSE):
        expected = known(**wan_inputs())[0]
    with torch.no_grad(), fastdit.install(model, "WanTransformer3DModel", SPARSE):
        assert torch.equal(model(**wan_inputs())[0], expected)


@pytest.mark.parametrize(
    ("model", "how", "message"),
    [
        (wan, "WanModel", "no model class 'WanModel'; known are"),
        (wan, (3, 8, 8), "a function of the call's arguments"),
        (lambda: nn.Linear(2, 2), layout, "Linear has no self-attention that fastdit could reach"),
    ],
)
def test_descriptions_that_describe_nothing(model, how, message):
    target = model()
    with pytest.raises(ValueError, match=message):
        fastdit.install(target, how)
    assert installed(target) is None
