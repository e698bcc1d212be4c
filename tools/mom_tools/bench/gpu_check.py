"""Check one GPU in a few minutes: is everything right on it, how fast is it, and what limits it?

    mom gpu-check                           # all parts, at most 6 minutes; results in the folder gpu-check
    python tools/gpu_check.py               # the same from a checkout that is not installed
    mom gpu-check --only kernels trainer    # two parts
    mom gpu-check --tiny                    # every part in sizes that test the command and measure nothing

The parts run in the order of their worth. Each is a process of its own with its own time limit: one that crashes, hangs
or runs out of memory ends alone, and the next one starts. OUTPUT/gpu_check.json and OUTPUT/gpu_check.md are written
again after every row, so that they hold what was done whenever the command is ended. On a machine without a GPU
everything runs on the CPU, in tiny sizes. Nothing is downloaded.

The exit code is 1 if a part about correctness found an error or did not end well, and 0 otherwise.
"""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import ctypes
import datetime
import faulthandler
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mom_tokenizers.errors import EXIT_FAILED, UserError, exit_clearly, user_path
from mom_tools.bench.findings import PROFILE, Findings, read_findings, table_of, write_whole
from mom_tools.options import command_parser


class Part(NamedTuple):
    """One part of the check: a function that is called with its Findings."""

    name: str
    title: str
    module: str
    limit: float
    """Seconds after which it is killed."""
    correctness: bool = False
    """Whether its failure makes the exit code 1."""


_KERNELS, _STEPS, _RUNS, _GRAPH = (f"mom_tools.bench.gpu_{name}" for name in ("kernels", "steps", "runs", "graph"))
MACHINE = Part("machine", "The machine and its limits", _KERNELS, 40)
PARTS = (
    Part("kernels", "Every backend against its definition in float64", _KERNELS, 75, True),
    Part("trainer", "The trainer against the CPU", _RUNS, 50, True),
    Part("resume", "Resuming to the last bit, with several checkpoints in a process", _RUNS, 50, True),
    Part("graph", "The passes as CUDA graphs, against the same passes without", _GRAPH, 45, True),
    Part("times", "Kernels beside stock kernels and limits", _KERNELS, 60),
    Part("steps", "The training step", _STEPS, 150),
    Part("transfusion", "Transfusion, generation and tokenizers", _STEPS, 40),
    Part("memory", "Memory as predicted and measured, and how long a checkpoint stops training", _RUNS, 45),
    Part("miniature", "A minute of training at 37M", _RUNS, 75),
)
"""In the order of their worth. The function of a part has the part's name."""

TOTAL = 360.0
"""Seconds that the whole command may take."""
_LEAST = 5.0  # seconds: a part for which less is left is not started

NEEDED = {
    "torch": "torch>=2.11",
    "numpy": "numpy>=1.26",
    "scipy": "scipy>=1.15",
    "yaml": "pyyaml>=6",
    "pydantic": "pydantic>=2.7",
    "safetensors": "safetensors>=0.4.3",
    "webdataset": "webdataset>=1.0.2",
    "tensorboard": "tensorboard>=2.17",
    "tqdm": "tqdm>=4.66",
    "tabulate": "tabulate>=0.9",
    "filelock": "filelock>=3.13",
    "fsspec": "fsspec>=2024.9",
}
"""Name of a module that the check imports -> what pip installs for it."""


def missing_packages() -> list[str]:
    """What pip would have to install before the check can run, found without importing any of it."""
    return [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]


# ---- one part ----------------------------------------------------------------------------------------------


def run_part(part: Part, folder: Path, device: str, tiny: bool, seconds: float) -> None:
    """The process of one part. It leads a process group, and dies with the process that started it."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout = sys.stderr = log = open(folder / "logs" / f"{part.name}.log", "w", buffering=1)  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    # Asked by this signal before it is killed, a part prints where it is. (dump_traceback_later would hold a lock that
    # a run which is forked from here waits for.)
    faulthandler.register(signal.SIGUSR1, log)
    scratch = folder / "scratch" / part.name
    scratch.mkdir(parents=True)
    findings = Findings(_file(folder, part), scratch, device, tiny, seconds)
    try:
        getattr(importlib.import_module(part.module), part.name)(findings)
    except BaseException:
        traceback.print_exc()
        os._exit(EXIT_FAILED)
    log.flush()
    os._exit(0)  # without destructors, which may wait for the device


def _file(folder: Path, part: Part) -> Path:
    return folder / "parts" / f"{part.name}.json"


def last_lines(file: Path, lines: int = 20, width: int = 300) -> list[str]:
    """The last lines of what a part has printed, each cut to `width` characters; where Python printed where it was, the
    lines from there on, of which the first says the most."""
    with suppress(OSError):
        text = file.read_text(encoding="utf-8", errors="replace")
        printed = [line[:width] for line in text.splitlines() if line.strip()]
        stacks = [number for number, line in enumerate(printed) if "most recent call first" in line]
        begin = max(stacks[-1] - 5 if stacks else len(printed) - lines, 0)
        return printed[begin : begin + lines]
    return []


# ---- all of them -------------------------------------------------------------------------------------------


class Ended(Exception):
    """Something has asked the command to end."""


class GpuCheck:
    """The parts to run, what has become of each, and the report about them."""

    def __init__(self, parts: Sequence[Part], folder: Path, total: float, tiny: bool, context: str = "fork"):
        """`folder` takes the results. After `total` seconds nothing runs any more. `context` is how the processes
        start: "fork", which needs no imports of its own, or "spawn"."""
        self.parts, self.folder, self.tiny, self.context = parts, folder, tiny, context
        self.begun, self.total = time.monotonic(), total
        self.device = "cpu"
        self.about = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "command": shlex.join([*(["mom", "gpu-check"] if sys.argv[0].startswith("mom") else sys.argv[:1]),
                                   *sys.argv[1:]]),
            "commit": commit(),
        }  # fmt: skip
        self.results: dict[str, dict[str, Any]] = {p.name: {"state": "not started"} for p in parts}

    def left(self) -> float:
        """Seconds until the whole command has to be done."""
        return self.total - (time.monotonic() - self.begun)

    def run(self) -> int:
        """Run all parts. Returns the exit code."""
        for name in ("logs", "parts", "scratch"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        try:
            for part in self.parts:
                if self.left() < _LEAST:
                    self.results[part.name] = {"state": "no time left"}
                    self._say(f"{part.name}: no time left")
                    continue
                self._run(part)
                if part is MACHINE:
                    self._learn(part)
        except Ended as ended:
            for result in self.results.values():
                if result["state"] == "not started":
                    result["state"] = "not started: the command was asked to end"
            self.write()
            self._say(f"ended by {ended}; {self.folder / 'gpu_check.md'} has what was done")
            return 128 + signal.Signals[str(ended)].value
        finally:
            shutil.rmtree(self.folder / "scratch", ignore_errors=True)
        self.write()
        self._say(f"done: {self.folder / 'gpu_check.md'}")
        return EXIT_FAILED if self.failed() else 0

    def _learn(self, machine: Part) -> None:
        """Choose device and sizes for the other parts by what the first one found. Where a forked process could not
        use the GPU, all processes are started anew instead."""
        result = self.results[machine.name]
        if result["state"] != "done" and self.context == "fork":
            self._say("the machine part did not end well; trying again with processes that are not forked")
            self.context = "spawn"
            self._run(machine)
        self.device = self.results[machine.name].get("figures", {}).get("device", "cpu")
        self.tiny |= self.device == "cpu"

    def failed(self) -> list[str]:
        """The parts about correctness that found an error, crashed, or were killed at their limit."""
        bad = lambda result: bool(result.get("wrong")) or result["state"].startswith(("failed", "killed"))  # noqa: E731
        return [p.name for p in self.parts if p.correctness and bad(self.results[p.name])]

    def _run(self, part: Part) -> None:
        limit = min(part.limit, self.left())
        self._say(f"{part.name}: at most {limit:.0f} s")
        process = multiprocessing.get_context(self.context).Process(  # type: ignore[attr-defined]
            target=run_part, args=(part, self.folder, self.device, self.tiny, limit)
        )
        begun, state = time.monotonic(), "ended with the command"
        self.results[part.name] = {"state": "running"}
        process.start()
        try:
            while process.is_alive() and time.monotonic() - begun < limit:
                process.join(0.2)
                self._look_at(part, "running", begun)
            if process.is_alive():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGUSR1)
                process.join(0.3)
                state = f"killed at its limit of {limit:.0f} s"
            elif process.exitcode:
                code = process.exitcode
                state = f"failed: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
            else:
                state = "done"
        finally:
            self._kill(process)
            self._look_at(part, state, begun)
        self._say(f"{part.name}: {state} after {time.monotonic() - begun:.1f} s")

    @staticmethod
    def _kill(process: Any) -> None:
        """End a part with all processes that it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()

    def _look_at(self, part: Part, state: str, begun: float) -> None:
        """Take over what the part has written, print its new rows, and write the report if anything is new."""
        found = read_findings(_file(self.folder, part))
        before = self.results[part.name].get("tables", {})
        for title, rows in found["tables"].items():
            for row in rows[len(before.get(title, ())) :]:
                if not title.startswith(PROFILE):
                    self._say("  " + " | ".join(filter(None, row.values())))
        result = {"state": state, **found}
        if state != "done" and state != "running":
            result["last_lines"] = last_lines(self.folder / "logs" / f"{part.name}.log")
        if result != {k: v for k, v in self.results[part.name].items() if k != "seconds"}:
            self.results[part.name] = {**result, "seconds": round(time.monotonic() - begun, 1)}
            self.write()

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun:4.0f} of {self.total:.0f} s] {text}", file=sys.stderr, flush=True)

    # ---- the report ----------------------------------------------------------------------------------------

    def write(self) -> None:
        """Write both files anew."""
        values = {**self.about, "tiny": self.tiny, "failed": self.failed(), "parts": self.results}
        write_whole(self.folder / "gpu_check.json", json.dumps(values, indent=1) + "\n")
        write_whole(self.folder / "gpu_check.md", self.markdown())

    def markdown(self) -> str:
        """The report: what was checked, what became of each part, and all tables."""
        machine = self.results.get(MACHINE.name, {}).get("figures", {})
        text = ["# GPU check", ""]
        text += [f"* {name}: {value}" for name, value in {**machine.get("about", {}), **self.about}.items()]
        if self.tiny:
            text += ["", "**Tiny sizes: this tests the command. Its times say nothing about the machine.**"]
        rows = []
        for part in self.parts:
            result = self.results[part.name]
            seconds = f"{result['seconds']:.1f}" if "seconds" in result else ""
            failed = "**WRONG**" if part.correctness else "done but for what failed"
            verdict = failed if result.get("wrong") and result["state"] == "done" else result["state"]
            rows.append({"part": part.name, "what it checks": part.title, "outcome": verdict, "s": seconds})
        text += ["", table_of(rows)]
        for part in self.parts:
            text += self._section(part, self.results[part.name])
        return "\n".join(text) + "\n"

    @staticmethod
    def _section(part: Part, result: dict[str, Any]) -> list[str]:
        failed = "**WRONG**" if part.correctness else "**failed**"
        text = [f"* {failed}: {line}" for line in result.get("wrong", ())]
        text += [f"* {line}" for line in result.get("notes", ())]
        text += [f"* not done: {line}" for line in result.get("left_out", ())]
        if text:
            text.append("")
        for title, rows in result.get("tables", {}).items():
            text += [f"**{title}**", "", table_of(rows), ""]
        if lines := result.get("last_lines"):
            text += ["The last lines that it printed:", "", "```", *lines, "```", ""]
        return ["", f"## {part.title}", "", *text] if text else []


def commit() -> str:
    """The commit of the checkout that this file is in, or why it is not known."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        told = [
            subprocess.run([*git, *command], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return "unknown (no git checkout)"
    return told[0] + (" with changes that are not committed" if told[1] else "")


def stand_in_for_installation(folder: Path) -> None:
    """The trainer records the version of the package. A checkout that is not installed has none, so that it is told to
    Python in `folder`."""
    try:
        importlib.metadata.version("mixture-of-mamba")
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).parents[3] / "pyproject.toml"
        found = re.search(r'^version = "(.+)"', project.read_text(), re.MULTILINE) if project.is_file() else None
        version = found[1] if found else "0"
        site = (folder / "site").resolve()
        about = site / f"mixture_of_mamba-{version}.dist-info"
        about.mkdir(parents=True, exist_ok=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mixture-of-mamba\nVersion: {version}\n")
        sys.path.append(str(site))


def _asked_to_end(number: int, frame: object) -> None:
    for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)  # so that the report is written whole
    raise Ended(signal.Signals(number).name)


def main() -> None:
    """Exits with 1 where a part about correctness failed."""
    parser = command_parser(__doc__)
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)} (all)")
    parser.add_argument("--tiny", action="store_true", help="sizes that test the command; on a CPU there are no others")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda ends at once without a GPU (default: either)")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="that all parts may take together (%(default)g)")
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), help="folder of the results (%(default)s)")
    arguments = parser.parse_args()
    with exit_clearly():
        if missing := missing_packages():
            raise UserError(
                f"this Python ({sys.executable}) lacks packages that the check needs; install them with\n"
                f"  {shlex.quote(sys.executable)} -m pip install {' '.join(map(shlex.quote, missing))}"
            )
        if arguments.seconds <= 0:
            raise UserError(f"--seconds {arguments.seconds:g} is not above 0")
        with user_path(arguments.output):
            arguments.output.mkdir(parents=True, exist_ok=True)
        stand_in_for_installation(arguments.output)
        sys.exit(_check(arguments))


def _check(arguments: Any) -> int:
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # NVML is asked whether there is a GPU: asking CUDA would make it unusable in the processes that are forked.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    wanted = [part for part in PARTS if not arguments.only or part.name in arguments.only]
    check = GpuCheck([MACHINE, *wanted], arguments.output, arguments.seconds, arguments.tiny)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _asked_to_end)
    try:
        import mom_train.trainer  # noqa: F401  # once for all parts, which are forked
    except Ended as ended:
        return 128 + signal.Signals[str(ended)].value
    return check.run()


if __name__ == "__main__":
    main()
