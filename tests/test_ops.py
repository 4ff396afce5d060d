import pytest
import torch

from fastdit import ops
from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.quant import Quant

LAYOUT = Layout((2, 4, 4), (1, 4, 2))


def qkv(dtype=torch.float32, tokens=32, dim=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, tokens, 2, dim, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]


def block_mask(heads=1):
    tile_map = torch.rand(1, heads, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    return BlockMask.from_tile_map(tile_map | torch.eye(4, dtype=torch.bool), LAYOUT)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_opcheck(heads, transposed, quant):
    """Schema, fake kernel (shapes, dtypes, strides) and tracing agree with what the op does."""
    q, k, v = qkv()
    if not transposed:
        q, k, v = (x.contiguous() for x in (q, k, v))
    m = block_mask(heads)
    quant = "none" if quant == "none" else str(Quant(qk="int8"))
    arguments = (q, k, v, m.kv_num_blocks, m.kv_indices, m.q_order, m.k_order, quant, 0.25)
    torch.library.opcheck(ops._attention, arguments, test_utils=("test_schema", "test_faketensor"))
    assert ops._attention(*arguments)[0].stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("options", ["pooled", "key", "low rank"])
def test_opcheck_of_options(options):
    (q, k, v), m = qkv(), block_mask()
    bias = torch.randn(1, 1, 32, 3), torch.randn(1, 2, 32, 3)
    more = {"pooled": (True,), "key": (False, None, bias[1][..., :1]), "low rank": (False, *bias)}[options]
    arguments = (q, k, v, m.kv_num_blocks, m.kv_indices, m.q_order, m.k_order, "int8/none", 0.25, *more)
    torch.library.opcheck(ops._attention, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_to_one_graph():
    q, k, v = qkv()
    m = block_mask()
    compiled = torch.compile(lambda *x: ops.attention(*x, m), fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(q, k, v), ops.attention(q, k, v, m), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("quant", ["none", "int8/fp8+k"])
@pytest.mark.parametrize("options", ["", "pooled", "dense"])
def test_opcheck_with_gradients(quant, options):
    """Autograd registration and AOTAutograd: the backward's fake kernel too."""
    q, k, v = (x.requires_grad_() for x in qkv())
    m = block_mask(2)
    masks = (None,) * 4 if options == "dense" else (m.kv_num_blocks, m.kv_indices, m.q_order, m.k_order)
    torch.library.opcheck(ops._attention, (q, k, v, *masks, quant, 0.25, options == "pooled"))


@pytest.mark.parametrize("of", ["out", "lse", "both"])
def test_gradients_compile_to_one_graph(of):
    m = block_mask()

    def loss(q, k, v):
        out, lse = ops.attention(q, k, v, m)
        return (out.square().sum() if of != "lse" else 0) + (lse.sum() if of != "out" else 0)

    inputs = [x.requires_grad_() for x in qkv()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    needed = inputs[:2] if of == "lse" else inputs
    found, expected = (torch.autograd.grad(each(*inputs), needed) for each in (compiled, loss))
    assert all(map(torch.equal, found, expected))


def test_without_gradients_nothing_is_kept():
    q, k, v = (x.requires_grad_() for x in qkv())
    with torch.no_grad():
        assert ops.attention(q, k, v, block_mask())[0].grad_fn is None


def test_no_backward_is_said_by_name():
    q, k, v = (x.requires_grad_() for x in qkv())
    with pytest.raises(NotImplementedError, match="no backward beside a bias"):
        ops.attention(q, k, v, bias_k=torch.randn(1, 1, 32, 1))[0].sum().backward()
    assert ops.no_gradient(q, Quant()) is None
    assert "meta" in ops.no_gradient(q.to("meta"), Quant())
    assert "sampled" in ops.no_gradient(q, Quant(), "sampled")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "needs q"),
        (lambda q, k, v: (q, k[:, :, 1:], v), "needs q"),
        (lambda q, k, v: (q[..., 1:], k, v), "needs q"),
        (lambda q, k, v: (q, k.double(), v), "one floating dtype"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), "one floating dtype"),
        (lambda q, k, v: (q[:, :, 1:], k, v), "32 query tokens, got 31"),
        (lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]), "32 key tokens, got 31"),
        (lambda q, k, v: tuple(x.expand(1, 2, 32, 16)[:, :1].expand(1, 3, 32, 16) for x in (q, k, v)), "2 heads"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.attention(*change(*qkv()), block_mask(2))


def test_a_device_without_a_kernel_is_refused():
    with pytest.raises(NotImplementedError, match="meta"):
        ops.attention(*(x.to("meta") for x in qkv()))


def test_run_is_attention_without_the_op():
    (q, k, v), m = qkv(), block_mask(2)
    raised = torch.zeros((), dtype=torch.int32)
    for mask, quant, remainder in (
        (m, Quant("int8", "fp8"), "pooled"),
        (m, Quant(), "none"),
        (None, Quant("fp8", "fp8"), "none"),
    ):
        expected = ops.attention(q, k, v, mask, quant, 0.25, remainder)
        for got, exact in zip(ops.run(q, k, v, mask, quant, 0.25, remainder, fault=raised), expected, strict=True):
            assert torch.equal(got, exact)
        assert int(raised) == 0
    bias = torch.randn(1, 1, 32, 1)
    found = ops.run(q, k, v, m, Quant(), 0.25, bias_k=bias)
    assert all(map(torch.equal, found, ops.attention(q, k, v, m, scale=0.25, bias_k=bias)))


def test_run_and_repair():
    (q, k, v), m, raised = qkv(), block_mask(), torch.zeros(1, dtype=torch.int32)
    ops.run(q, k, v * float("nan"), m, Quant(), 0.25, fault=raised)
    assert raised.tolist() == [1]
    out = torch.full_like(q, float("nan"))
    ops.repair(q, k, v, out, 0.25, raised)
    assert raised.tolist() == [1]
    assert torch.equal(out, ops.attention(q, k, v, scale=0.25)[0])
    kept = out.clone()
    ops.repair(q, k, v * float("nan"), out, 0.25, raised * 0)
    assert torch.equal(out, kept)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v, out, raised: (q, k, v, out, raised.long()), ValueError, "one int32"),
        (lambda q, k, v, out, raised: (q, k, v, out, raised.expand(2)), ValueError, "one int32"),
        (lambda q, k, v, out, raised: (q, k, v, out.half(), raised), ValueError, "like q"),
        (lambda q, k, v, out, raised: (q, k, v, out[:, :, 1:], raised), ValueError, "like q"),
        (lambda *x: tuple(y.to("meta") for y in x), NotImplementedError, "meta"),
    ],
)
def test_what_cannot_be_repaired_is_named(change, error, message):
    q, k, v, out, raised = change(*qkv(), qkv()[0], torch.zeros(1, dtype=torch.int32))
    with pytest.raises(error, match=message):
        ops.repair(q, k, v, out, 0.25, raised)
