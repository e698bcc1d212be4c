"""Time the whole training step of the mixture, of dense Mamba and of a Transformer of the same size, by row length.

    mom bench step --dim 256 --layers 4 --length 1024 --precision bf16
    mom bench step --context 1k 4k 16k 64k --dim 64 --layers 2 --vocabulary 512

The systems take turns, so that a busy machine slows all of them down, and a ratio is the median of the
turns' ratios. Times are medians: CPU time of the process on a CPU (all threads together), CUDA events on a GPU.
"""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from mom_tokenizers.errors import UserError
from mom_train.config.model import PROJECTIONS, ModelConfig, Part
from mom_train.config.optimizer import OptimizerConfig
from mom_train.config.run import Recompute
from mom_train.cost.flops import training_flops_per_token
from mom_train.cost.gemm import gemm_flops_per_second
from mom_train.distributed.ranks import process_group
from mom_train.model.init import initial_value, initialize
from mom_train.model.language_model import LanguageModel
from mom_train.ops.layout import RowLayout
from mom_train.ops.routing import fp8
from mom_train.optim.gradients import Clipping
from mom_train.optim.optimizer import build_optimizer

PHASES = ("forward", "backward", "clip", "optimizer")
SYSTEMS = ("mixture", "dense", "transformer", "mot")
"""Mixture-of-Mamba, dense Mamba, a dense Transformer and the Mixture-of-Transformers."""
_RECOMPUTE: dict[str, Recompute] = {"false": False, "true": True, "selective": "selective"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS[:3]), help="(all but mot)")
    parser.add_argument("--dim", type=int, default=256, help="width of the residual stream (256)")
    parser.add_argument("--layers", type=int, default=4, help="of two Mamba blocks or one Transformer block each (4)")
    parser.add_argument("--heads", type=int, help="of a Transformer (dim / 32)")
    parser.add_argument("--vocabulary", type=int, default=65_536, help="ids (65536)")
    parser.add_argument("--modalities", type=int, default=3, help="weights of the mixture's projections (3)")
    parser.add_argument("--batch", type=int, default=2, help="rows of the batch (2)")
    parser.add_argument("--length", type=int, default=1024, help="positions in a row (1024)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp8"), default="fp32")
    parser.add_argument("--checkpointing", choices=tuple(_RECOMPUTE), default="false")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument("--profile", action="store_true", help="profile one more step of each; --json has the kernels")
    parser.add_argument("--repetitions", type=int, default=5, help="timed steps of each (5)")
    parser.add_argument("--warm-up", type=int, default=5, help="steps of each before, not timed (5)")
    parser.add_argument(
        "--context",
        nargs="+",
        type=_length,
        metavar="L",
        help="one row of each of these lengths (4k, 64k), mixture alone",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def _length(text: str) -> int:
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_arguments` asks for -> figures, as `markdown` prints them. Raises ValueError where no model is so."""
    torch.manual_seed(0)
    contexts = arguments.context
    settings: dict[str, Any] = {
        key: value for key, value in vars(arguments).items() if isinstance(value, int | str | list)
    }
    settings |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": _device_name(arguments)}
    # On a GPU clipping sums over a group of one, as training does. On a CPU the group's threads would count as well.
    with process_group() if arguments.device == "cuda" else nullcontext():
        if contexts:
            steps = {str(length): _Step("mixture", arguments, 1, length) for length in contexts}
        else:
            steps = {name: _Step(name, arguments, arguments.batch, arguments.length) for name in arguments.systems}
        figures = _measure(steps, arguments.warm_up, arguments.repetitions, arguments.profile)
    if not contexts:
        rate = _gemm_flops_per_second(arguments)
        settings["gemm_gflops_per_s"] = rate / 1e9
        for values in figures.values():
            values["share_of_gemm_rate"] = values["gflops_per_s"] * 1e9 / rate
    return {"settings": settings, "context" if contexts else "systems": figures}


class _Step:
    """One system, its optimiser and its rows."""

    def __init__(self, name: str, arguments: argparse.Namespace, batch: int, length: int):
        config = _config(name, arguments)
        modalities = 1 if name == "dense" else arguments.modalities
        recompute = _RECOMPUTE[arguments.checkpointing]
        self.tokens = batch * length
        self.flops = training_flops_per_token(config, arguments.vocabulary, length) * self.tokens
        self.device, self._precision = torch.device(arguments.device), arguments.precision
        with self.device:
            self.model = LanguageModel(config, arguments.vocabulary, modalities, recompute=recompute)
        if self.device.type == "cuda":
            draw_on_device(self.model)
        else:
            initialize(self.model, 0)
        if self._precision == "fp8":
            grouped = modalities > 1 and name != "transformer"
            if (obstacle := fp8.why_not(self.device, grouped)) is not None:
                raise UserError(f"--precision fp8: {obstacle}")
            self.model.use_fp8("device")
        if arguments.compile:
            for block in self.model.blocks:
                block.compile()
        self.optimizer = build_optimizer(self.model, OptimizerConfig.model_validate({"learning_rate": 1e-4}))
        names = [f"modality {m}" for m in range(modalities)]
        self._clipping = None
        if self.device.type == "cuda":
            self._clipping = Clipping(self.model, names, 1.0, copies=1, one_pass=True)
        self._no_sums = torch.zeros(0, dtype=torch.float64, device=self.device)
        self._shape, self._modalities, self._used = (batch, length), arguments.modalities, modalities
        self._generator = torch.Generator().manual_seed(1)
        self.input_T, self.label_T = torch.randint(0, arguments.vocabulary, (2, self.tokens)).to(self.device)
        self.draw()

    def draw(self) -> None:
        """Draw new spans and documents for the next step, because no two batches of a training have the same. All
        systems draw the same ones."""
        batch, length = self._shape
        modality_BL, document_BL = _rows(batch, length, self._modalities, self._generator)
        layout = RowLayout.sort(modality_BL.clamp(max=self._used - 1), document_BL, self._used)
        moved = {k: v.to(self.device) for k, v in vars(layout).items() if isinstance(v, Tensor)}
        self.layout = RowLayout(**{**vars(layout), **moved})

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._precision == "fp32" else torch.autocast(self.device.type, torch.bfloat16)

    def __call__(self, lap: Callable[[str], AbstractContextManager[None]]) -> None:
        with lap("forward"), self._autocast():
            loss = self.model(self.input_T, self.layout, self.label_T).tokens / self.tokens
        with lap("backward"):
            loss.backward()
        with lap("clip"):
            if self._clipping is None:
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            else:
                self._clipping(self._no_sums, self.optimizer, detailed=False)
        with lap("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def peak_bytes(self) -> int:
        """The most bytes that one step needs in addition to the weights and moments, which stay between steps."""
        nothing = lambda phase: nullcontext()  # noqa: E731
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self(nothing)
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            self(nothing)
        events = (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
        return max(accumulate(n for _, n in sorted((e.start_ns(), e.nbytes()) for e in events)))


def _config(name: str, arguments: argparse.Namespace) -> ModelConfig:
    size = {"dim": arguments.dim, "layers": arguments.layers}
    if name in ("transformer", "mot"):
        heads = arguments.heads or max(1, arguments.dim // 32)
        decoupled: tuple[Part, ...] = ("attention", "feed_forward", "norm") if name == "mot" else ()
        return ModelConfig(architecture="transformer", heads=heads, decoupled=decoupled, **size)
    return ModelConfig(decoupled=PROJECTIONS if name == "mixture" else (), **size)


@torch.no_grad()
def draw_on_device(model: LanguageModel) -> None:
    """Initial values for a model whose speed alone matters: large matrices are drawn on the device from the right range
    instead of one by one on the CPU, which takes minutes for billions of weights."""
    for name, parameter in model.named_parameters():
        if parameter.numel() < 1 << 20:
            generator = torch.Generator().manual_seed(0)
            parameter.copy_(initial_value(name, tuple(parameter.shape), model.config, generator))
        else:
            bound = 0.03 if name.startswith("embedding") else parameter.shape[-1] ** -0.5
            parameter.uniform_(-bound, bound)


def _rows(batch: int, length: int, modalities: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(modality, document), (B, L) each: spans of 30 to 300 positions, in documents of four spans."""
    T = batch * length
    spans = torch.randint(30, 301, (T // 30 + 1,), generator=generator)
    number_T = torch.arange(len(spans)).repeat_interleave(spans)[:T].view(batch, length)
    return (number_T % modalities).to(torch.uint8), (number_T // 4).to(torch.int32)


def _measure(steps: dict[str, _Step], warm_up: int, repetitions: int, profiling: bool = False) -> dict[str, Any]:
    """Name of a system -> its figures. The systems take turns."""
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for _ in tqdm(range(warm_up + repetitions), unit="round", disable=None):
        for name, step in steps.items():
            step.draw()
            lap = _Laps(step.device)
            step(lap)
            laps[name].append(lap.milliseconds())
    figures = {}
    for name, step in steps.items():
        timed = laps[name][warm_up:]
        phases = {phase: statistics.median(lap[phase] for lap in timed) for phase in PHASES}
        whole = statistics.median(sum(lap.values()) for lap in timed)
        without = statistics.median(sum(lap.values()) - lap["optimizer"] for lap in timed)
        figures[name] = {
            **{f"{phase}_ms": value for phase, value in phases.items()},
            "step_ms": whole,
            "without_optimizer_ms": without,
            "us_per_token": 1e3 * without / step.tokens,
            "tokens_per_s": 1e3 * step.tokens / whole,
            "gflops_per_s": step.flops / whole / 1e6,
            "parameters": sum(p.numel() for p in step.model.parameters()),
            "peak_bytes": step.peak_bytes(),
            **(profiled(step) if profiling else {}),
        }
    if "dense" in laps:
        for name, values in figures.items():
            own, base = laps[name][warm_up:], laps["dense"][warm_up:]
            values["over_dense"] = paired_ratio(own, base, PHASES)
            values["over_dense_without_optimizer"] = paired_ratio(own, base, PHASES[:-1])
    return figures


def profiled(step: _Step) -> dict[str, Any]:
    """What the profiler sees in one step: `device_ms`, the sum over all kernels, and for each of `kernels` its name,
    its milliseconds and its calls, the longest first. On a CPU these are PyTorch's operators without what they call."""
    cuda = step.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        step(lambda phase: nullcontext())
        if cuda:
            torch.cuda.synchronize()
    kernels = []
    for event in seen.key_averages():
        # the optimiser marks a range on the device, whose time is that of its kernels once more
        if (event.device_type.name == "CUDA") == cuda and not event.key.startswith(("Optimizer.", "ProfilerStep")):
            time_us = event.self_device_time_total if cuda else event.self_cpu_time_total
            kernels.append({"name": event.key, "ms": time_us / 1e3, "calls": event.count})
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return {"device_ms": sum(kernel["ms"] for kernel in kernels), "kernels": kernels}


def paired_ratio(own: list[dict[str, float]], base: list[dict[str, float]], phases: Sequence[str]) -> float:
    """Median of the ratios of the same turn: a shared machine drifts more than systems differ."""
    return statistics.median(
        sum(a[p] for p in phases) / sum(b[p] for p in phases) for a, b in zip(own, base, strict=True)
    )


class _Laps:
    """Milliseconds of each phase of one step."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: dict[str, tuple[Any, Any]] = {}

    def _now(self) -> Any:
        if not self._cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begun = self._now()
        yield
        self._marks[phase] = begun, self._now()

    def milliseconds(self) -> dict[str, float]:
        if not self._cuda:
            return {phase: 1e3 * (end - begun) for phase, (begun, end) in self._marks.items()}
        torch.cuda.synchronize()
        return {phase: begun.elapsed_time(end) for phase, (begun, end) in self._marks.items()}


def _gemm_flops_per_second(arguments: argparse.Namespace) -> float:
    """The speed of one large matrix product in the run's precision, which no step can exceed."""
    device = torch.device(arguments.device)

    def seconds(work: Callable[[], Any]) -> float:
        lap = _Laps(device)
        with lap("gemm"):
            work()
        return lap.milliseconds()["gemm"] / 1e3

    dtype = torch.float32 if arguments.precision == "fp32" else torch.bfloat16  # also beside fp8
    return gemm_flops_per_second(device, dtype, seconds, arguments.repetitions)


def _device_name(arguments: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"


def markdown(result: dict[str, Any]) -> str:
    """The figures of `run` as a table."""
    rows: list[Sequence[str]]
    if "context" in result:
        rows = [("positions", "us per token", "peak MB", "peak bytes per token")]
        for length, v in result["context"].items():
            peak = v["peak_bytes"]
            rows.append((length, f"{v['us_per_token']:.2f}", f"{peak / 1e6:.1f}", f"{peak / int(length):.0f}"))
    else:
        phases = [f"{phase} ms" for phase in PHASES]
        ratios = ("over_dense", "over_dense_without_optimizer")
        rows = [
            (
                "",
                "parameters (M)",
                *phases,
                "step ms",
                "/ dense",
                "/ dense, no optimizer",
                "tokens/s",
                "of GEMM",
                "peak MB",
            )
        ]
        for name, v in result["systems"].items():
            milliseconds = [f"{v[f'{phase}_ms']:.0f}" for phase in (*PHASES, "step")]
            over_dense = [f"{v[ratio]:.3f}" if ratio in v else "" for ratio in ratios]
            rate = (f"{v['tokens_per_s']:.0f}", f"{v['share_of_gemm_rate']:.2f}", f"{v['peak_bytes'] / 1e6:.0f}")
            rows.append((name, f"{v['parameters'] / 1e6:.1f}", *milliseconds, *over_dense, *rate))
    return tabulate(rows[1:], rows[0], tablefmt="pipe", disable_numparse=True)
