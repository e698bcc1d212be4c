"""Writes the figures of a run to metrics.jsonl, TensorBoard and the like, and to the terminal. Used by rank 0."""

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
    """A file that lines are appended to. Lines that cannot be written are kept and tried again with the next line."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._waiting = bytearray()

    def append(self, line: str) -> None:
        """Writes a line, after those that are still waiting. Raises OSError as `flush` does."""
        self._waiting += f"{line}\n".encode()
        self.flush()

    def flush(self) -> None:
        """Writes the waiting lines. Raises OSError if the disk does not take all of them; the rest stays in memory."""
        while self._waiting:
            del self._waiting[: os.write(self._file, self._waiting)]

    def close(self) -> None:
        os.close(self._file)


class FailedWrites:
    """Counts writes of figures that fail, for example on a full disk, and lets training go on.

    It logs one warning when writes to a file begin to fail and another when they succeed again.
    """

    def __init__(self) -> None:
        self.count = 0
        self._failing: set[str] = set()

    @contextmanager
    def tolerated(self, what: Path) -> Iterator[None]:
        """A context for code that writes to `what`. An OSError in it is counted and does not leave the context."""
        try:
            yield
        except OSError as error:
            self.count += 1
            if str(what) not in self._failing:
                log.warning("%s CANNOT BE WRITTEN; training goes on, and writing is tried again: %s", what, error)
            self._failing.add(str(what))
        else:
            if str(what) in self._failing:
                log.warning("%s can be written again", what)
            self._failing.discard(str(what))

    def at_the_end(self) -> None:
        """Logs an error for each file that could not be written again."""
        for what in sorted(self._failing):
            log.error("%s lacks everything that was logged after writing to it began to fail", what)


class Record:
    """The log of a run's figures. A context manager, used by rank 0.

    Each logged step is one JSON object in metrics.jsonl. TensorBoard, and Weights & Biases if the config names it, get
    the same names and values. A progress line shows steps, losses, tokens per second and the time left.

    A run that resumes after step n drops what was logged after it, so that no step is there twice. Failed writes do not
    end the run while it trains (`FailedWrites`), but UserError is raised if the files cannot be written at the start.
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
            # The file is not rewritten without need, because the disk may be full.
            if not self._path.exists() or self._path.read_text() != _as_text(kept):
                self._replace(kept)
            self._lines = Lines(self._path)
        with user_path(config.run_dir / "tensorboard"):
            self._writers: list[TensorBoard | Wandb] = [TensorBoard(config, resumed_at, kept)]
        if config.wandb is not None:
            self._writers.append(Wandb(config))
        # on a terminal one line is updated often; a log file gets a new line only now and then
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
        """Logs the values of a step. Values that are not finite are left out, because JSON has no such numbers. If the
        last logged step is the same, as it can be after a resume, the values are added to its line."""
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
        """Logs the documents that the model wrote at `step`, each a sequence of spans."""
        for writer in self._writers:
            with self._failed.tolerated(writer.place):
                writer.samples(step, documents)


class Clock:
    """Measures the speed of training between two laps. Time spent in `paused` does not count."""

    def __init__(self, tokens: int):
        self._since, self._tokens, self._waited = time.perf_counter(), tokens, 0.0
        self.seconds = 0.0
        """Length of the last lap in seconds."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context for code that waits for data."""
        begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begun

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context for code that is not training, such as validation."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    def lap(self, tokens: int) -> dict[str, float]:
        """Ends a lap. Returns its tokens per second and the share of its time that was spent waiting for data.

        `tokens` counts all tokens since the run began.
        """
        now = time.perf_counter()
        self.seconds = seconds = now - self._since
        values = {"perf/tokens_per_s": (tokens - self._tokens) / seconds, "perf/data_wait": self._waited / seconds}
        self._since, self._tokens, self._waited = now, tokens, 0.0
        return values


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The logged steps of a run, oldest first. A last line that a crash cut short is left out. Raises UserError if the
    file is missing or a line does not hold the figures of a step."""
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
