"""Where a run's figures go: metrics.jsonl, TensorBoard and the like, and a line on the terminal. Written by rank 0."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from mom_train.config import RunConfig

if TYPE_CHECKING:  # readers of metrics.jsonl need no torch
    from mom_train.sampling import Span
    from mom_train.writers import TensorBoard, Wandb


class Record:
    """One JSON object per logged step in metrics.jsonl, the same names and values in TensorBoard and where else the
    config says, and a progress line (steps, losses, tokens/s, time left). A context manager.

    A run that resumes after step n drops whatever was logged beyond it, so that no step stands there twice.
    """

    def __init__(self, config: RunConfig, resumed_at: int, last: int):
        from mom_train.writers import TensorBoard, Wandb

        self._path = config.run_dir / "metrics.jsonl"
        known = _whole_lines(self._path) if self._path.exists() else []
        lines = known if resumed_at else []  # a run that begins anew logs step 0 again
        kept = [line for line in map(json.loads, lines) if line["step"] <= resumed_at]
        self._last: dict[str, float] = kept[-1] if kept else {}
        self._replace(kept)
        self._writers: list[TensorBoard | Wandb] = [TensorBoard(config, resumed_at, kept)]
        if config.wandb is not None:
            self._writers.append(Wandb(config))
        # one line that changes on a terminal, a line now and then in a log file
        interval = 0.5 if sys.stderr.isatty() else 10
        self.bar = tqdm(total=last, initial=resumed_at, unit="step", dynamic_ncols=True, mininterval=interval)

    def _replace(self, lines: Sequence[Mapping[str, float]]) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        partial.rename(self._path)
        self._file = open(self._path, "a")  # noqa: SIM115  # open as long as the run

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self._file.close()
        for writer in self._writers:
            writer.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log a step. What is not finite is left out: JSON has no such numbers. Values of a step that was logged
        already, before a resume, are added to its line."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if self._last.get("step") == step:
            self._file.close()
            self._replace([*read_metrics(self._path.parent)[:-1], {**self._last, **values}])
        else:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        for writer in self._writers:
            writer.write(step, values)

        losses = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
        if losses:
            self.bar.set_postfix_str(f"{losses} | {values['perf/tokens_per_s']:,.0f} tok/s", refresh=False)

    def samples(self, step: int, documents: Sequence[Sequence[Span]]) -> None:
        for writer in self._writers:
            writer.samples(step, documents)


class Clock:
    """Seconds of training since the last look: without those spent in `paused`, and how many in `waiting`."""

    def __init__(self, tokens: int):
        self._since, self._tokens, self._waited = time.perf_counter(), tokens, 0.0
        self.seconds = 0.0
        """Of the last lap."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begun

    @contextmanager
    def paused(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    def lap(self, tokens: int) -> dict[str, float]:
        """Tokens per second, and the share of the time spent waiting for data, since the last lap."""
        now = time.perf_counter()
        self.seconds = seconds = now - self._since
        values = {"perf/tokens_per_s": (tokens - self._tokens) / seconds, "perf/data_wait": self._waited / seconds}
        self._since, self._tokens, self._waited = now, tokens, 0.0
        return values


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The logged steps of a run, oldest first. A line that a crash cut short is left out."""
    return [json.loads(line) for line in _whole_lines(run_dir / "metrics.jsonl")]


def _whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().split("\n")[:-1] if line]
