"""`fastdit bench kernel`: rows on this CPU, refusal beside a wrong answer, and the static model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from util import environment, fastdit

from fastdit.apps.bench import attention, kernel, roofline
from fastdit.apps.errors import UserError
from fastdit.core.layout import Layout
from fastdit.core.quant import Quant
from fastdit.kernels import cpu

SMALL = ((2, 8, 8), (1, 4, 4), 1, 16, "float32", [Quant(), Quant("int8", "fp8", smooth_k=True)], [1, 0.5], "cpu", 1, False)


def test_command_writes_rows(tmp_path):
    done = fastdit(
        "bench", "kernel", "--grid", "2x8x8", "--tile", "1x4x4", "--heads", 1, "--dim", 16, "--densities", "0.5",
        "--formats", "none,int8/none+k", "--repeats", 1, "--out", tmp_path / "rows.json", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "every format is right" in done.stdout
    assert "33x256x256" not in done.stdout  # what `fastdit bench` alone would measure
    written = json.loads((tmp_path / "rows.json").read_text())
    assert {row["quant"] for row in written["rows"]} == {"none", "int8/none+k"}
    for row in written["rows"]:
        assert 0.2 < row["density"] < 1
        assert row["ratio"] == pytest.approx(row["baselines_ms"][row["baseline"]] / row["ms"])
        assert row["baseline"] == min(row["baselines_ms"], key=row["baselines_ms"].get)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--grid", "3x3"), "time x height x width"),
        (("--formats", "fp9/none"), "qk must be one of"),
        (("--densities", "2"), "(0, 1]"),
        (("--dtype", "int8"), "bfloat16, float16 or float32"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    done = fastdit("bench", "kernel", *arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("fault", ["a tenth too large", "rows that see nothing", "lse"])
def test_nothing_is_timed_beside_a_wrong_answer(monkeypatch, fault):
    real = cpu.block_sparse_attention

    def wrong(q, *arguments):
        out, lse = real(q, *arguments)
        if len(arguments) == 8:  # the check's own emulation stays right
            return out, lse
        if fault == "a tenth too large":
            return out * 1.1, lse
        return (out + lse.isneginf()[..., None], lse) if fault == "rows that see nothing" else (out, lse + 0.5)

    monkeypatch.setattr(cpu, "block_sparse_attention", wrong)
    monkeypatch.setattr(attention, "measure", lambda *x: pytest.fail("something was timed"))
    with pytest.raises(UserError, match="a kernel is wrong"):
        kernel.run(*SMALL)


def test_flex_attention_is_given_the_same_mask():
    """Its answer, without compiling it for speed, is that of our kernel."""
    layout = Layout((2, 8, 8), (1, 8, 8))
    q, k, v = attention.inputs(layout, 1, 16, torch.float32, "cpu")
    mask = attention.BlockMask.from_tile_map(torch.tensor([[[[True, False], [True, True]]]]), layout)
    compiled = torch.compile
    try:
        torch.compile = lambda function, **_: function
        got = attention.flex(q, k, v, layout, mask)()
    finally:
        torch.compile = compiled
    torch.testing.assert_close(got, attention.ops.attention(q, k, v, mask)[0], rtol=1e-5, atol=1e-5)


ROW = {"block_q": 64, "block_k": 128, "dim": 128, "warps": 4, "loop": 512, "quant": "fp8/fp8",
       "mix": {"exp2": 64, "mufu": 0, "alu": 100, "fma": 200}}  # fmt: skip


def test_model_counts_what_the_hardware_needs():
    pipes = roofline.model(ROW, roofline.H200, 32768, 8, 1.0)
    seconds = 4 * 32768**2 * 128 * 8 / (132 * 1.98e9 * 8192)  # floating-point operations over the FP8 rate
    assert pipes["tensor"] == pytest.approx(1000 * seconds)
    assert pipes["issue"] == pytest.approx(pipes["tensor"])  # 512 instructions of a warp, as many tensor cycles
    assert pipes["serial"] == pytest.approx(2 * pipes["overlapped"])
    half = roofline.model(ROW, roofline.H200, 32768, 8, 0.5)
    assert half["tensor"] == pytest.approx(pipes["tensor"] / 2)
    assert half["memory"] == pipes["memory"]
    sixteen = roofline.model(ROW | {"quant": "none"}, roofline.H200, 32768, 8, 1.0)
    assert sixteen["tensor"] == pytest.approx(2 * pipes["tensor"])


def test_model_is_printed_without_a_gpu():
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    plain = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastdit", "bench", "kernel", "--model", "--formats", "fp8/fp8", "--densities", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=plain | {"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    assert "64x128, 4 warps" in done.stdout
    assert "tensor 2.05" in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("dim", [64, 128, 80])
def test_every_format_is_right_on_the_gpu_at_hand(dim):
    """In a process of its own: in this one Triton may be in interpreter mode."""
    code = (
        "import torch\nfrom fastdit.apps.bench.attention import wrong\nfrom fastdit.apps.bench.sass import FORMATS\n"
        "from fastdit import ops\nq = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device='cuda')\n"
        f"print(wrong([x for x in FORMATS if ops.unsupported(q, x) is None], ({dim},), torch.bfloat16, 'cuda'))"
    )
    plain = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]"), done.stdout
