"""Where a run's figures go: metrics.jsonl, TensorBoard and the like, and a line on the terminal. Written by rank 0."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from mom_tokenizers.errors import UserError, user_path
from mom_train.config.run import RunConfig

if TYPE_CHECKING:  # readers of metrics.jsonl need no torch
    from mom_train.generate.samples import Span
    from mom_train.observe.tensorboard import TensorBoard
    from mom_train.observe.wandb import Wandb


log = logging.getLogger(__name__)


class Lines:
    """A file that lines are appended to. What cannot be written is kept and tried again with the next line."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._waiting = bytearray()

    def append(self, line: str) -> None:
        self._waiting += f"{line}\n".encode()
        self.flush()

    def flush(self) -> None:
        """Write what is waiting. Raises OSError where the disk does not take all of it; the rest goes on waiting."""
        while self._waiting:
            del self._waiting[: os.write(self._file, self._waiting)]

    def close(self) -> None:
        os.close(self._file)


class FailedWrites:
    """Writes of figures that fail, as on a full disk: training goes on, each kind of them is warned about once, and all
    are counted."""

    def __init__(self) -> None:
        self.count = 0
        self._failing: set[str] = set()

    @contextmanager
    def tolerated(self, what: Path) -> Iterator[None]:
        """A block that writes `what`, and tries again next time where it raises an OSError."""
        try:
            yield
        except OSError as error:
            self.count += 1
            if str(what) not in self._failing:
                log.warning("%s CANNOT BE WRITTEN; training goes on, and it is tried again: %s", what, error)
            self._failing.add(str(what))
        else:
            if str(what) in self._failing:
                log.warning("%s can be written again", what)
            self._failing.discard(str(what))

    def at_the_end(self) -> None:
        for what in sorted(self._failing):
            log.error("%s lacks what was logged since it could not be written any more", what)


class Record:
    """One JSON object per logged step in metrics.jsonl, the same names and values in TensorBoard and where else the
    config says, and a progress line (steps, losses, tokens/s, time left). A context manager.

    A run that resumes after step n drops whatever was logged beyond it, so that no step stands there twice. What cannot
    be written while it trains does not end it (`FailedWrites`); to begin with, the files must be writable: UserError.
    """

    def __init__(self, config: RunConfig, resumed_at: int, last: int):
        from mom_train.observe.tensorboard import TensorBoard
        from mom_train.observe.wandb import Wandb

        self._path = config.run_dir / "metrics.jsonl"
        known = read_metrics(config.run_dir) if resumed_at and self._path.exists() else []
        kept = [line for line in known if line["step"] <= resumed_at]  # a run that begins anew logs step 0 again
        self._last: dict[str, float] = kept[-1] if kept else {}
        self._failed = FailedWrites()
        with user_path(self._path):
            if not self._path.exists() or self._path.read_text() != _as_text(kept):  # a full disk is left alone
                self._replace(kept)
            self._lines = Lines(self._path)
        with user_path(config.run_dir / "tensorboard"):
            self._writers: list[TensorBoard | Wandb] = [TensorBoard(config, resumed_at, kept)]
        if config.wandb is not None:
            self._writers.append(Wandb(config))
        # one line that changes on a terminal, a line now and then in a log file
        interval = 0.5 if sys.stderr.isatty() else 10
        self.bar = tqdm(total=last, initial=resumed_at, unit="step", dynamic_ncols=True, mininterval=interval)

    def _replace(self, lines: Sequence[Mapping[str, float]]) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(_as_text(lines))
        partial.rename(self._path)

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        with self._failed.tolerated(self._path):
            self._lines.flush()
        self._lines.close()
        for writer in self._writers:
            with self._failed.tolerated(writer.place):
                writer.close()
        self._failed.at_the_end()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log a step. What is not finite is left out: JSON has no such numbers. Values of a step that was logged
        already, before a resume, are added to its line."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if self._failed.count:
            values["record/failed_writes"] = self._failed.count
        with self._failed.tolerated(self._path):
            if self._last.get("step") == step:
                self._replace([*read_metrics(self._path.parent)[:-1], {**self._last, **values}])
                self._lines.close()
                self._lines = Lines(self._path)
            else:
                self._lines.append(json.dumps({"step": step, **values}))
        for writer in self._writers:
            with self._failed.tolerated(writer.place):
                writer.write(step, values)

        losses = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
        if losses:
            self.bar.set_postfix_str(f"{losses} | {values['perf/tokens_per_s']:,.0f} tok/s", refresh=False)

    def samples(self, step: int, documents: Sequence[Sequence[Span]]) -> None:
        for writer in self._writers:
            with self._failed.tolerated(writer.place):
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
    """The logged steps of a run, oldest first. A line that a crash cut short is left out. Raises UserError where the
    file is missing or another line is not what was logged."""
    path = run_dir / "metrics.jsonl"
    values = []
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(value, dict) or "step" not in value or {*map(type, value.values())} - {int, float}:
            raise UserError(f"{path}, line {number}: not the figures of a step")
        values.append(value)
    return values


def _as_text(lines: Sequence[Mapping[str, float]]) -> str:
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def _whole_lines(path: Path) -> list[str]:
    with user_path(path):
        return [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
