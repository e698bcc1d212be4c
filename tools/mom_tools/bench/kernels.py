"""Time the kernels beside the limits of the hardware and beside other people's programs, in the same run.

    mom bench scan --batch 2 --length 1024 --dim 1024
    mom bench conv | routing | block [--published CLONE] [--dtype bf16] [--json [OUT]]
    mom bench step --help

Every candidate first has its output and all gradients compared with a float64 definition at a small size; what is
wrong is not timed, and the exit code is 1. Times are medians over repetitions in which the candidates take turns: CPU
time of one thread on a CPU, CUDA events on a GPU. Floors are measured in the same run; docs/explanation/performance.md
defines them.
"""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import ctypes
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from mom_tokenizers.errors import EXIT_FAILED, UserError, exit_clearly
from mom_tools.bench.suites import SUITES, Candidate, Sizes
from mom_tools.options import add_json, command_parser
from mom_tools.output import write_json
from mom_train.cost.gemm import gemm_flops_per_second
from mom_train.ops import native

TOLERANCE = {"scan": (1e-5, 3e-2), "conv": (1e-5, 2e-2), "routing": (1e-5, 2e-2), "block": (1e-4, 8e-2)}
"""Greatest error of an output or gradient over its greatest magnitude, fp32 and bf16."""


def check(name: str, s: Sizes) -> dict[str, float]:
    """Candidate -> greatest relative error of its output and gradients at a small size."""
    suite = SUITES[name](s.small())
    errors: dict[str, float] = {}
    truth = suite.truth
    assert truth is not None
    for candidate in suite.candidates:
        candidate.prepare()
        prefix = f"{candidate.name.split(',')[0]}/" if name == "routing" else ""
        errors[candidate.name] = greatest_error(candidate, truth, prefix)
    return errors


def greatest_error(candidate: Candidate, truth: dict[str, Tensor], prefix: str = "") -> float:
    """The greatest error of the candidate's output and gradients over the greatest magnitude of each in `truth`, whose
    names begin with `prefix`; infinite where something is not a number."""
    greatest = 0.0
    for key, ours in candidate.backward().items():
        if prefix + key in truth:
            wanted = truth[prefix + key].detach()
            difference = (candidate.in_time(ours.detach()).double().reshape(wanted.shape) - wanted).abs().max()
            error = float(difference / wanted.abs().max())
            greatest = max(greatest, error if error == error else math.inf)
    return greatest


def measure(candidates: list[Candidate], repetitions: int, device: str) -> dict[str, dict[str, float]]:
    """Candidate -> medians in ms, forward (without gradients) and both, and the most bytes that both need at once."""
    times: dict[str, tuple[list[float], list[float]]] = {c.name: ([], []) for c in candidates}
    with tqdm(total=(repetitions + 1) * len(candidates), unit="turn", disable=None) as bar:
        for repetition in range(-1, repetitions):  # the first is for warming up
            for candidate in candidates:
                bar.set_postfix_str(candidate.name)
                candidate.prepare()
                with torch.no_grad():
                    forward = timed(candidate.forward, device)
                both = timed(candidate.backward, device)
                if repetition >= 0:
                    times[candidate.name][0].append(forward)
                    times[candidate.name][1].append(both)
                bar.update()
    figures = {}
    for candidate in candidates:
        candidate.prepare()
        forwards, boths = times[candidate.name]
        figures[candidate.name] = {
            "forward_ms": statistics.median(forwards),
            "both_ms": statistics.median(boths),
            "peak_mb": peak_bytes(candidate.backward, device) / 1e6,
        }
    return figures


def timed(run: Callable[[], Any], device: str) -> float:
    """Milliseconds that `work` takes: CPU time of the process, or time by the GPU's own clock."""
    if device == "cpu":
        begin = time.process_time()
        run()
        return (time.process_time() - begin) * 1e3
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    run()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1])


def peak_bytes(run: Callable[[], Any], device: str) -> float:
    """The most bytes in use at once, beyond those in use before; nan where the operating system does not say."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = _status(status, "VmRSS")
        run()
        return _status(status, "VmHWM") - before
    except (OSError, KeyError):
        return math.nan


def _status(path: Path, key: str) -> int:
    return int(dict(line.split(":", 1) for line in path.read_text().splitlines())[key].split()[0]) * 1024


def limits(s: Sizes) -> dict[str, float]:
    """What this machine reaches now: matrix products in FLOP/s, copying in bytes/s read and written, and on a
    CPU the seconds per element (token, channel, state) of the C scan's two inner loops on data in the nearest cache."""
    source = torch.ones(1 << 24 if s.device == "cpu" else 1 << 28, device=s.device)
    target = torch.empty_like(source)
    best = lambda run: min(timed(run, s.device) for _ in range(5)) / 1e3  # noqa: E731
    once = lambda run: timed(run, s.device) / 1e3  # noqa: E731
    found = {"gemm_flops_per_s": gemm_flops_per_second(torch.device(s.device), s.dtype, once, repetitions=5)}
    found["copy_bytes_per_s"] = 2 * 4 * source.numel() / best(lambda: target.copy_(source))
    library = native.library(s.state) if s.device == "cpu" else None
    if library is not None:
        library.mom_scan_floor.restype = ctypes.c_int64
        for reverse, name in enumerate(("forward", "reverse")):
            per_pass = library.mom_scan_floor(ctypes.c_int64(1), reverse)
            seconds = best(lambda reverse=reverse: library.mom_scan_floor(ctypes.c_int64(400), reverse))
            found[f"{name}_s_per_element"] = seconds / 400 / per_pass
    return found


def floors(name: str, s: Sizes, limit: dict[str, float]) -> tuple[float, float] | None:
    """Milliseconds that forward, and forward and backward, cannot fall below here; None where that is unknown."""
    T, d, D, N, w = s.batch * s.length, s.dim, 2 * s.dim, s.state, torch.finfo(s.dtype).bits // 8
    R = math.ceil(d / 16)
    gemm = 2 * T * (2 * d * D + D * (R + 2 * N) + R * D + D * d) / limit["gemm_flops_per_s"]
    conv = tuple(n * T * D * w / limit["copy_bytes_per_s"] for n in (2, 5))
    if name == "conv":
        return conv[0] * 1e3, conv[1] * 1e3
    if name == "routing":
        return gemm * 1e3, 3 * gemm * 1e3
    if "forward_s_per_element" not in limit:
        return None
    forward, reverse = limit["forward_s_per_element"], limit["reverse_s_per_element"]
    moved = tuple((n * D + m * N) * T * w / limit["copy_bytes_per_s"] for n, m in ((4, 2), (11, 6)))
    scan = max(T * D * N * forward, moved[0]), max(T * D * N * (2 * forward + reverse), moved[1])
    if name == "scan":
        return scan[0] * 1e3, scan[1] * 1e3
    return (gemm + conv[0] + scan[0]) * 1e3, (3 * gemm + conv[1] + scan[1]) * 1e3


def run(name: str, s: Sizes, repetitions: int, without: Sequence[str] = ()) -> dict[str, Any]:
    """Figures of one subcommand, as `markdown` prints them."""
    errors, tolerance = check(name, s), TOLERANCE[name][s.dtype == torch.bfloat16]
    suite = SUITES[name](s)
    wrong = {n: e for n, e in errors.items() if e > tolerance}
    left_out = {c.name for c in suite.candidates if any(part in c.name for part in without)}
    suite.absent |= dict.fromkeys(left_out, "--without")
    timed_ones = [c for c in suite.candidates if c.name not in wrong and c.name not in left_out]
    figures = measure(timed_ones, repetitions, s.device)
    if name == "routing":
        for kind in ("ours", "one dense matrix", "boolean masks"):
            parts = [v for n, v in figures.items() if n.endswith(f", {kind}")]
            if len(parts) == 4:
                figures[f"all four, {kind}"] = {
                    "forward_ms": sum(v["forward_ms"] for v in parts),
                    "both_ms": sum(v["both_ms"] for v in parts),
                    "peak_mb": max(v["peak_mb"] for v in parts),
                }
    limit = limits(s)
    floor = floors(name, s, limit)
    for n, values in figures.items():
        base = f"{n.split(',')[0]}, one dense matrix" if name == "routing" else "its four GEMMs alone"
        base_values = figures.get(base, next(iter(figures.values())))
        values["error"] = errors.get(n, math.nan)
        values["forward_ratio"] = values["forward_ms"] / base_values["forward_ms"]
        values["both_ratio"] = values["both_ms"] / base_values["both_ms"]
        if floor and (name != "routing" or n.startswith("all four")):
            values["forward_of_floor"] = floor[0] / values["forward_ms"]
            values["both_of_floor"] = floor[1] / values["both_ms"]
    sizes = {k: str(v) if isinstance(v, torch.dtype | Path) else v for k, v in vars(s).items()}
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), **limit}
    return {"kernel": name, "sizes": sizes, "machine": machine, "wrong": wrong, "absent": suite.absent,
            "figures": figures}  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """The figures of `run` as a table, with what did not run and the limits measured beside them."""
    columns = ("forward_ms", "both_ms", "forward_ratio", "both_ratio", "forward_of_floor", "both_of_floor", "peak_mb")
    header = ("", "forward ms", "both ms", "forward ratio", "both ratio", "forward of floor", "both of floor",
              "peak MB", "error")  # fmt: skip
    rows = []
    for name, values in result["figures"].items():
        cells = [f"{values[c]:.4g}" if values.get(c) == values.get(c) and c in values else "" for c in columns]
        rows.append((name, *cells, f"{values['error']:.1e}" if values["error"] == values["error"] else ""))
    text = [tabulate(rows, header, tablefmt="pipe", disable_numparse=True), ""]
    text += [f"WRONG, not timed: {name} (error {error:.1e})" for name, error in result["wrong"].items()]
    text += [f"not run: {name}: {why}" for name, why in result["absent"].items()]
    measured = {k: v for k, v in result["machine"].items() if isinstance(v, float)}
    text.append("limits measured: " + ", ".join(f"{k} {v:.3g}" for k, v in measured.items()))
    return "\n".join(text)


def main() -> None:
    """Exits with 1 where a candidate computes something wrong."""
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in SUITES:
        command = commands.add_parser(name, help=f"the {name}" if name != "block" else "a whole Mamba block")
        command.add_argument("--batch", type=int, default=2, help="rows of the batch (2)")
        command.add_argument("--length", type=int, default=1024, help="positions in a row, over 100 (1024)")
        command.add_argument("--dim", type=int, default=1024, help="width of the model; channels are twice this (1024)")
        command.add_argument("--state", type=int, default=16, help="size N of the state (16)")
        command.add_argument("--modalities", type=int, default=3, help="(3)")
        command.add_argument(
            "--dtype", choices=("fp32", "bf16"), default="fp32", help="precision of the rows; bf16 is autocast"
        )
        command.add_argument(
            "--repetitions", type=int, default=7, help="timed repetitions, after one that is not timed (7)"
        )
        command.add_argument("--threads", type=int, default=1, help="threads on a CPU (1)")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument(
            "--without", nargs="+", default=[], metavar="PART", help="leave out the candidates whose name contains this"
        )
        command.set_defaults(published=None)
        if name == "block":
            help = "a clone of github.com/Weixin-Liang/Mixture-of-Mamba; documents are off then, as it has none"
            command.add_argument("--published", type=Path, metavar="CLONE", help=help)
    step = commands.add_parser("step", help="the whole training step")
    if "step" in sys.argv[1:2]:
        from mom_tools.bench import step as bench_step

        bench_step.add_arguments(step)
    for command in commands.choices.values():
        add_json(command)
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it says at length that a CPU has no CUDA
    with exit_clearly():
        if arguments.command == "step":
            result = bench_step.run(arguments)
            text, failed = bench_step.markdown(result), False
        else:
            if arguments.length <= 100 or min(vars(arguments)[k] for k in ("batch", "dim", "state", "modalities")) < 1:
                raise UserError("sizes are positive and --length is over 100, which small checks are not")
            torch.set_num_threads(arguments.threads)
            s = Sizes(**{k: v for k, v in vars(arguments).items() if k in Sizes.__annotations__})
            s.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
            result = run(arguments.command, s, arguments.repetitions, arguments.without)
            text, failed = markdown(result), bool(result["wrong"])
        if write_json(arguments.json, result, indent=2):
            print(text)
    if failed:
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
