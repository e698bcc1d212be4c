"""The selective scan in CUDA C++ (kernels/scan.cu), for NVIDIA GPUs and states of 16.

A warp owns 32 channels with all their states, which never leave its registers. A CTA is four warps, which share B and
C. The rows of the next 16 steps are copied into shared memory while these 16 are computed. The backward pass starts
each such chunk from the state that the forward pass kept before it. If there are too few CTAs to fill the device, rows
are cut into spans that run side by side (`span_count`): a pass before either direction computes what each span makes
of a state or gradient of zero, and its factor for any other, from the last reset in the span on, or up to its first.
There are no atomic additions: sums over CTAs, rows and spans add partial sums in a fixed order, so every run gives the
same bits.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from mom_tokenizers.errors import UserError
from mom_train.ops import nvrtc
from mom_train.ops.chunks import CUDA_SCAN_STEPS

SOURCES = Path(__file__).with_name("kernels")
FLAGS = ("--use_fast_math",)  # denormal numbers are zero
NAMES = ("scan_forward", "scan_spans", "scan_carry", "scan_backward", "scan_sums")
CHUNK = CUDA_SCAN_STEPS
STATES, CTA_CHANNELS, THREADS, _BLOCK = 16, 128, 128, 4  # these, and CHUNK, as in tile.cuh
_MODALITIES = 8  # with so many, all kernels must fit the device
_SPANS = 32  # at most
_MIN_CHUNKS = 8  # per span
_ALONE = 0.62  # time of a CTA that has an SM for itself, relative to two that share one
_BEFORE_FORWARD, _BEFORE_BACKWARD = 0.7, 0.3  # the most that the pass before costs, relative to the pass itself

_POINTERS = (
    "x dt z B C grad_y A D dt_bias entering order modality position y states leaving own decay grad_x grad_dt grad_z "
    "grad_B grad_C grad_A grad_D grad_dt_bias"
)
_INTEGERS = (
    "x_stride dt_stride z_stride B_stride C_stride y_stride grad_y_stride grad_stride length channels modalities "
    "chunks span spans"
)


class Arguments(ctypes.Structure):
    """`Arguments` of tile.cuh. It does not keep the tensors alive that it points to."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        ("tokens", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in _INTEGERS.split()),
    ]

    def point(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, None if tensor is None else tensor.data_ptr())
            if hasattr(self, f"{name}_stride"):
                assert tensor is not None
                setattr(self, f"{name}_stride", tensor.stride(0) * tensor.element_size())


class _Sum(ctypes.Structure):
    _fields_ = [
        ("parts", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("quads", ctypes.c_longlong),
        ("terms", ctypes.c_int),
        ("is_row", ctypes.c_int),
    ]


class Sums(ctypes.Structure):
    """`Sums` of sums.cuh."""

    _fields_ = [("of", _Sum * 5)]


def why_not(x: Tensor, state: int) -> str | None:
    """The reason why these kernels cannot run on rows like x (T, D), or None if they can. Compiles them if they can."""
    if x.device.type != "cuda" or torch.version.hip:
        return "they need an NVIDIA GPU"
    if x.dtype == torch.float64:
        return "they compute in fp32, not float64"
    if x.shape[1] % 32:
        return f"{x.shape[1]} channels are not a multiple of 32"
    if state != STATES:
        return f"an SSM state of {state} is not {STATES}"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if obstacle := nvrtc.missing():
        return obstacle
    bf16 = x.dtype == torch.bfloat16
    try:
        limit = kernels(x.device, bf16).shared_limit
    except RuntimeError as error:  # Unavailable, or what the bindings raise if the driver lacks a function
        return f"they could not be compiled and loaded: {error}"
    needed = shared_bytes("scan_backward", bf16, _MODALITIES)
    rows = "bf16" if bf16 else "fp32"
    return None if needed <= limit else f"{rows} rows need {needed} bytes of shared memory, this GPU has {limit}"


@functools.cache
def kernels(device: torch.device, bf16: bool) -> nvrtc.Kernels:
    """The kernels for bf16 or fp32 rows on a device. Raises nvrtc.Unavailable."""
    major, minor = torch.cuda.get_device_capability(device)
    return nvrtc.Kernels(machine_code(10 * major + minor, bf16), NAMES, device)


def machine_code(arch: int, bf16: bool) -> bytes:
    """The cubin for bf16 or fp32 rows and compute capability arch/10. Raises nvrtc.Unavailable."""
    return nvrtc.machine_code(SOURCES, "scan.cu", arch, (*FLAGS, f"-DROWS_BF16={int(bf16)}"))


def shared_bytes(name: str, bf16: bool, modalities: int) -> int:
    """Bytes of shared memory of a CTA of one kernel."""
    pairs, plane, tile = CHUNK * 256, CHUNK * 32 * (2 if bf16 else 4), 32 * STATES * 4
    head, bias = CHUNK * 512 + 1024, (modalities + 1) * CTA_CHANNELS * 4
    if name == "scan_sums":
        return 0
    if name == "scan_backward":
        sums = 2 * 4 * CHUNK * STATES * 4
        return head + sums + 4 * (2 * pairs + (CHUNK // _BLOCK - 1) * tile + 4 * plane) + 2 * bias
    per_warp = {
        "scan_forward": 2 * pairs + 3 * plane,
        "scan_spans": pairs + 2 * plane,
        "scan_carry": pairs + 3 * plane,
    }
    return head + 4 * per_warp[name] + bias


def new_states(x: Tensor, A: Tensor, batch: int, keep: bool) -> Tensor:
    """An empty tensor for the states before each chunk (B, chunks, N, D), which the backward pass needs.

    Each of its tiles of 512 is in an order of the kernels' own.
    """
    if not keep:
        return A.new_empty(0)
    return A.new_empty(batch, -(-x.shape[0] // batch // CHUNK), A.shape[1], A.shape[0])


def span_count(ctas: int, chunks: int, processors: int, resident: int, before: float) -> int:
    """Number of spans per row that takes the least time by this model.

    ctas: CTAs if rows are not cut; processors: SMs; resident: CTAs that an SM holds at a time; before: the time of the
    pass that spans need before, relative to the pass itself. CTAs run in waves of `processors * resident`, and a wave
    that is not full takes as long as a full one. More than two CTAs at a time are not counted on, because the issue of
    instructions is then the limit.
    """
    resident = min(resident, 2)
    places = processors * resident

    def time(spans: int) -> float:
        waves = -(-ctas * spans // places)
        alone = _ALONE if resident == 2 and ctas * spans <= processors else 1.0
        return waves * alone * -(-chunks // spans) * (1.0 if spans == 1 else 1.0 + before)

    best = 1
    for spans in range(2, _SPANS + 1):
        if chunks // spans < _MIN_CHUNKS:
            break
        if time(spans) < 0.97 * time(best):
            best = spans
    return best


def _cut_rows(kernel: str, rows: nvrtc.Kernels, bf16: bool, a: Arguments, batch: int, before: float) -> None:
    """Sets the number of spans, and of chunks in each."""
    shared = shared_bytes(kernel, bf16, a.modalities)
    if shared > rows.shared_limit:
        raise UserError(
            f"the cuda kernels of the scan cannot hold {a.modalities} modalities in the {rows.shared_limit} bytes of "
            f"shared memory of {rows.device}; set MOM_KERNELS=triton"
        )
    ctas = batch * -(-a.channels // CTA_CHANNELS)
    spans = span_count(ctas, a.chunks, rows.processors, rows.resident(kernel, THREADS, shared), before)
    a.span = -(-a.chunks // spans)
    a.spans = -(-a.chunks // a.span)


def _rows(tensors: list[Tensor], bf16: bool) -> list[Tensor]:
    """Rows of one dtype that copies of 16 bytes (8 or 16 of B and C) can read. Only what is not so is copied."""
    result = []
    for t in tensors:
        t = t.to(torch.bfloat16 if bf16 else torch.float32)
        size = 16 if t.shape[1] > STATES else 4 * t.element_size()
        aligned = t.stride(1) == 1 and t.data_ptr() % size == 0 and t.stride(0) * t.element_size() % size == 0
        result.append(t if aligned else t.clone(memory_format=torch.contiguous_format))
    return result


def _are_bf16(*tensors: Tensor) -> bool:
    """Whether all rows are bf16. Rows of any other dtype, or of several, are taken to fp32."""
    return all(t.dtype == torch.bfloat16 for t in tensors)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    h0: Tensor | None, order: Tensor, rows: Tensor, modality: Tensor, position: Tensor, batch: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `selective_scan`."""
    given, bf16 = x.dtype, _are_bf16(x, dt, z, B, C)
    x, dt, z, B, C = _rows([x, dt, z, B, C], bf16)
    A, D, dt_bias, order, modality, position = (t.contiguous() for t in (A, D, dt_bias, order, modality, position))
    h0 = None if h0 is None else h0.contiguous()
    (T, Dn), blocks, run = x.shape, -(-x.shape[1] // CTA_CHANNELS), kernels(x.device, bf16)
    y, hT, states = x.new_empty(T, Dn), A.new_empty(batch, Dn, STATES), new_states(x, A, batch, keep)
    a = Arguments(tokens=T, length=T // batch, channels=Dn, modalities=dt_bias.shape[0])
    a.chunks = -(-a.length // CHUNK)
    _cut_rows("scan_forward", run, bf16, a, batch, _BEFORE_FORWARD)
    a.point(x=x, dt=dt, z=z, B=B, C=C, A=A, D=D, dt_bias=dt_bias, order=order, modality=modality, position=position)
    a.point(y=y, leaving=hT, states=states if keep else None, entering=h0)
    if a.spans > 1:
        own, decay = A.new_empty(2, batch, a.spans, Dn * STATES).unbind()
        a.point(own=own, decay=decay)
        run.launch(
            "scan_spans", (blocks, a.spans - 1, batch), THREADS, shared_bytes("scan_spans", bf16, a.modalities), a
        )
    run.launch("scan_forward", (blocks, a.spans, batch), THREADS, shared_bytes("scan_forward", bf16, a.modalities), a)
    return y.to(given), hT, states


def backward(
    grad_y: Tensor, grad_hT: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    dt_bias: Tensor, states: Tensor, order: Tensor, rows: Tensor, modality: Tensor, position: Tensor, batch: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    bf16 = _are_bf16(x, dt, z, B, C)  # as in the forward pass
    x, dt, z, B, C, grad_y = _rows([x, dt, z, B, C, grad_y], bf16)
    A, D, dt_bias, order, modality, position = (t.contiguous() for t in (A, D, dt_bias, order, modality, position))
    grad_hT = grad_hT.contiguous()
    (T, Dn), M, blocks, run = x.shape, dt_bias.shape[0], -(-x.shape[1] // CTA_CHANNELS), kernels(x.device, bf16)
    a = Arguments(tokens=T, length=T // batch, channels=Dn, modalities=M)
    a.chunks = -(-a.length // CHUNK)
    _cut_rows("scan_backward", run, bf16, a, batch, _BEFORE_BACKWARD)
    grad_x, grad_dt, grad_z = (x.new_empty(T, Dn) for _ in range(3))
    parts = {
        "grad_B": A.new_empty(blocks, T, STATES),
        "grad_C": A.new_empty(blocks, T, STATES),
        "grad_A": A.new_empty(batch * a.spans, Dn, STATES),
        "grad_D": A.new_empty(batch * a.spans, Dn),
        "grad_dt_bias": A.new_empty(batch * a.spans, M, Dn),
    }
    grad_h0 = A.new_empty(batch, Dn, STATES)
    a.point(x=x, dt=dt, z=z, B=B, C=C, A=A, D=D, dt_bias=dt_bias, order=order, modality=modality, position=position)
    a.point(grad_y=grad_y, entering=grad_hT, states=states, grad_x=grad_x, grad_dt=grad_dt, grad_z=grad_z)
    a.point(leaving=grad_h0, **parts)
    a.grad_stride = grad_x.stride(0) * grad_x.element_size()
    if a.spans > 1:
        own, decay = A.new_empty(2, batch, a.spans, Dn * STATES).unbind()
        a.point(own=own, decay=decay)
        run.launch("scan_carry", (blocks, a.spans - 1, batch), THREADS, shared_bytes("scan_carry", bf16, M), a)
    run.launch("scan_backward", (blocks, a.spans, batch), THREADS, shared_bytes("scan_backward", bf16, M), a)

    sums, jobs = Sums(), {}
    for name, part in parts.items():
        like = x if name in ("grad_B", "grad_C") else part
        jobs[name] = like.new_empty(part.shape[1:])
    for job, (name, total) in zip(sums.of, jobs.items(), strict=True):
        job.parts, job.sum = parts[name].data_ptr(), total.data_ptr()
        job.quads, job.terms, job.is_row = total.numel() // 4, parts[name].shape[0], name in ("grad_B", "grad_C")
    quads = max(total.numel() for total in jobs.values()) // 4
    run.launch("scan_sums", (-(-quads // THREADS), len(jobs), 1), THREADS, 0, sums)
    return (grad_x, grad_dt, jobs["grad_A"], jobs["grad_B"], jobs["grad_C"], jobs["grad_D"], grad_z,
            jobs["grad_dt_bias"], grad_h0)  # fmt: skip
