"""Where a run's figures go: metrics.jsonl, TensorBoard, and a line on the terminal. Written by rank 0."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class MetricsWriter:
    """One JSON object per logged step in metrics.jsonl, the same names and values in TensorBoard.

    A run that resumes after step n drops whatever was logged beyond it, so that no step stands there twice.
    """

    def __init__(self, run_dir: Path, resumed_at: int):
        self._path = run_dir / "metrics.jsonl"
        if self._path.exists():
            kept = [line for line in _whole_lines(self._path) if json.loads(line)["step"] <= resumed_at]
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            partial.rename(self._path)
        self._file = open(self._path, "a")  # noqa: SIM115  # open as long as the run
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The logged steps of a run, oldest first. A line that a crash cut short is left out."""
    return [json.loads(line) for line in _whole_lines(run_dir / "metrics.jsonl")]


def _whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().split("\n")[:-1] if line]


def progress_bar(total: int, done: int) -> tqdm:
    """Steps done, losses, tokens/s and time left; one line on a terminal, a line now and then in a log file."""
    return tqdm(
        total=total,
        initial=done,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,
        smoothing=0.05,
    )


def short(values: Mapping[str, float]) -> str:
    """Losses and speed for the progress line."""
    losses = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
    return f"{losses} | {values['perf/tokens_per_s']:,.0f} tok/s"
