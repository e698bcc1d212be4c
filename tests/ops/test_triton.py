"""The Triton kernels against the float64 definitions: on the GPU where there is one, else in Triton's interpreter.

The interpreter runs the kernels' own code, element by element in NumPy, and takes about a second per ten steps:
hence the sizes, and the shortened chunks.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mom_train.ops import backends
from mom_train.ops.conv import naive as naive_conv
from mom_train.ops.conv.causal_conv import _conv, causal_conv
from tests.helpers import CHECKOUT
from tests.helpers.scan_cases import DEVICE, NAMES, close, defined_scan, random_layout, run_scan, scan_inputs

triton = pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested on this machine")
with pytest.MonkeyPatch.context() as patch:  # read when a kernel is defined, not when it runs
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
    from mom_train.ops.conv import triton as triton_conv
    from mom_train.ops.scan import triton as triton_scan
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="NO GPU: the Triton kernels only ran in the interpreter")


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(triton_scan, "CHUNK", 4)
    monkeypatch.setattr(triton_conv, "SPAN", 8)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(
    ("B", "L", "D", "N", "M", "carried", "dtype", "spans", "tolerance"),
    [  # ragged and whole chunks, an empty modality, one modality, rows cut into spans
        (2, 10, 32, 16, 3, False, torch.float32, 1, 2e-6),
        (1, 14, 64, 8, 2, True, torch.float32, 3, 2e-6),
        (1, 8, 32, 16, 1, True, torch.bfloat16, 1, 2e-2),
        (1, 9, 32, 4, 2, False, torch.float16, 2, 2e-3),
    ],
)
def test_scan_and_all_its_gradients_equal_the_float64_recurrence(
    B, L, D, N, M, carried, dtype, spans, tolerance, monkeypatch
):
    monkeypatch.setattr(triton_scan, "span_count", lambda *_: spans)
    modality, document, layout = random_layout(B, L, M, L, carried, empty=1 if M == 3 else None)
    inputs, h0, gy, ghT = scan_inputs(B, L, D, N, M, carried, dtype, L)
    expected = defined_scan(inputs, h0, gy, ghT, modality, document)
    for name, ours, theirs in zip(
        NAMES, run_scan(inputs, h0, gy, ghT, layout, dtype, "triton"), expected, strict=False
    ):
        close(ours, theirs, 2 * tolerance, name)


@pytest.mark.usefixtures("short_chunks")
def test_a_row_cut_into_spans_gives_the_same_and_every_run_gives_the_same_bits(monkeypatch):
    _, _, layout = random_layout(1, 10, 2, 3, True)
    inputs, h0, gy, ghT = scan_inputs(1, 10, 32, 4, 2, True, torch.float32, 3)
    results = []
    for spans in (1, 1, 2):
        monkeypatch.setattr(triton_scan, "span_count", lambda *_, spans=spans: spans)
        results.append(run_scan(inputs, h0, gy, ghT, layout, torch.float32, "triton"))
    for name, whole, again, cut in zip(NAMES, *results, strict=True):
        assert torch.equal(whole, again), name
        close(cut, whole.cpu().double(), 2e-6, name)


@pytest.mark.parametrize(
    ("batch", "blocks", "spans"),
    [(8, 128, 1), (2, 128, 4), (1, 128, 8), (4, 64, 4), (1, 32, 33), (3, 128, 2)],
)
def test_spans_fill_an_h100_and_leave_no_program_over_for_a_second_round(batch, blocks, spans, monkeypatch):
    h100 = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)
    assert triton_scan.span_count(batch, 4096, blocks, torch.device("cuda")) == spans
    assert spans == 1 or spans * batch * blocks <= 2 * 4 * 132


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(
    ("B", "L", "D", "K", "carried", "dtype", "tolerance"),
    [
        (1, 19, 32, 4, False, torch.float32, 2e-6),
        (1, 16, 96, 4, True, torch.float32, 2e-6),
        (2, 2, 32, 4, True, torch.float32, 2e-6),  # shorter than the taps
        (1, 11, 32, 3, True, torch.bfloat16, 2e-2),
        (1, 9, 32, 1, True, torch.float32, 2e-6),  # nothing before a row is carried in
        (1, 1, 32, 2, True, torch.float32, 2e-6),
    ],
)
def test_convolution_and_its_gradients_equal_the_float64_definition(B, L, D, K, carried, dtype, tolerance):
    _, document, layout = random_layout(B, L, 2, L, carried)
    g = torch.Generator().manual_seed(L)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype).double()  # noqa: E731
    x, w, b, gy = draw(B, L, D), draw(D, K), draw(D), draw(B, L, D)
    leaves = [t.requires_grad_() for t in (x, w, b, *([draw(B, K - 1, D)] if carried else []))]
    y = naive_conv.causal_conv(*leaves[:3], document, leaves[3] if carried else None)
    expected = torch.autograd.grad(y, leaves, gy, materialize_grads=True)  # one tap uses nothing carried

    order = layout.order.long()
    rows = lambda t: t.detach().to(DEVICE).flatten(0, 1)[layout.rows].to(dtype)  # noqa: E731
    wide = torch.cat([rows(x), rows(x)], 1).requires_grad_()
    ours = [wide, *(t.detach().float().to(DEVICE).requires_grad_() for t in leaves[1:3])]
    ours += [t.detach().to(DEVICE, dtype).requires_grad_() for t in leaves[3:]]
    out, _ = causal_conv(wide[:, :D], *ours[1:3], layout, ours[3] if carried else None, backend="triton")
    grads = torch.autograd.grad(out, ours, rows(gy))
    close(out.detach()[order].view(B, L, D), y.detach(), tolerance, "y")
    for name, mine, theirs in zip(("x", "weight", "bias", "initial"), grads, expected, strict=False):
        mine = mine[order][:, :D].reshape(B, L, D) if name == "x" else mine
        close(mine, theirs, tolerance, f"gradient of {name}")


@pytest.mark.usefixtures("short_chunks")
def test_operators_keep_torchs_contract():
    _, _, layout = random_layout(1, 4, 2, 1, False)
    leaf = lambda *shape: torch.randn(*shape, device=DEVICE).requires_grad_()  # noqa: E731
    geometry = (layout.order, layout.rows)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    args = (leaf(4, 32), leaf(32, 4), leaf(32), None, *geometry, layout.position, 1, "triton")
    torch.library.opcheck(_conv, args, test_utils=tests)
    rows = (leaf(4, 32), leaf(4, 32), leaf(32, 4), leaf(4, 4), leaf(4, 4), leaf(32), leaf(4, 32), leaf(2, 32))
    args = (*rows, None, *geometry, layout.modality, layout.position, 1, "triton", True)
    torch.library.opcheck(torch.ops.mom.selective_scan.default, args, test_utils=tests)


def test_what_triton_cannot_run_goes_to_another_backend_and_says_why(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_chosen", {})
    x = torch.zeros(4, 32)
    assert backends.why_not("triton", "scan", x.double(), 16) is not None
    if DEVICE == "cpu":
        assert backends.why_not("triton", "scan", x, 16) == "they need an NVIDIA GPU"
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "48" in backends.why_not("triton", "scan", torch.zeros(4, 48, device=DEVICE), 16)
    assert "state of 5" in backends.why_not("triton", "scan", x.to(DEVICE), 5)
    assert backends.why_not("triton", "scan", x.to(DEVICE), 16) is None
    with caplog.at_level("INFO", logger=backends.__name__):
        assert backends.choose("conv", torch.zeros(4, 33), 4) == "torch"
        backends.choose("conv", torch.zeros(4, 33), 4)
    assert len([r for r in caplog.records if "not a multiple" in r.message]) == 1
    monkeypatch.setattr(backends, "forced", "c")
    monkeypatch.setattr(backends, "_chosen", {})
    with pytest.raises(ValueError, match="MOM_KERNELS=c cannot run the conv kernel"):
        backends.choose("conv", torch.zeros(4, 33), 4)


def test_every_kernel_compiles_for_hopper_without_spilling(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    tool = CHECKOUT / "tools/dev/compile_kernels.py"
    command = [sys.executable, str(tool), "--arch", "90", "--only", "triton", "--json", str(tmp_path / "kernels.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert {r["kernel"] for r in results} >= {"scan forward", "scan backward", "conv forward", "conv backward"}
    for result in results:
        assert result["spilled_bytes"] == 0, result
        assert result["spill_instructions"] == 0, result
        assert result["registers"] <= 255, result


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "L", "D"), [(8, 2048, 2048), (1, 16384, 2048), (3, 1000, 1536)])
def test_at_real_sizes_the_gpu_agrees_with_the_torch_backend(B, L, D, dtype):
    _, _, layout = random_layout(B, L, 3, 0, True)
    inputs, h0, gy, ghT = scan_inputs(B, L, D, 16, 3, True, dtype, 0)
    ours = run_scan(inputs, h0, gy, ghT, layout, dtype, "triton")
    again = run_scan(inputs, h0, gy, ghT, layout, dtype, "triton")
    theirs = run_scan(inputs, h0, gy, ghT, layout, dtype, backend="torch")
    for name, mine, same, other in zip(NAMES, ours, again, theirs, strict=True):
        assert torch.equal(mine, same), name
        close(mine, other.cpu().double(), 1e-4 if dtype == torch.float32 else 2e-2, name)
