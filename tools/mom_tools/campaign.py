"""Trains the many runs that a report needs, within a budget of time, and goes on where it was killed."""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from mom_tokenizers.errors import EXIT_PREEMPTED
from mom_tools.compare.curves import Run
from mom_tools.processes import Processes

HELD_OUT = "held_out"
"""The name of the validation set of all runs."""
_SHOW_EVERY = 60  # seconds between lines about progress
_TRIES = 2  # of a run that fails


class Job(Protocol):
    """One training run."""

    @property
    def id(self) -> str:
        """Its name, and its folder in OUTPUT/runs."""

    @property
    def kind(self) -> str:
        """`time` for a short run that is only timed."""

    @property
    def rate(self) -> float:
        """Its learning rate."""

    @property
    def steps(self) -> int:
        """Its steps."""


class State(Protocol):
    """What is needed to go on after a restart."""

    spent: float
    """Seconds over all starts."""
    failed: dict[str, str]
    """Job -> why, after a second try."""

    def save(self, path: Path) -> None:
        """Writes it to a file."""


J = TypeVar("J", bound=Job)


def startable(
    jobs: Iterable[J], busy: set[str], begun: set[str], seconds: Callable[[J], float], left: float
) -> list[J]:
    """The jobs that may start with `left` seconds of the budget, in order, up to the first one that would not end in
    time, as `seconds` predicts. `busy` jobs run now. Jobs that had `begun` before a restart are finished in any case,
    and those that are only timed are too short to matter."""
    found: list[J] = []
    for job in jobs:
        if job.id in busy:
            continue
        if job.kind != "time" and job.id not in begun and seconds(job) > left:
            break
        found.append(job)
    return found


class Campaign(ABC, Generic[J]):
    """Runs side by side. The state is written to OUTPUT/state.json after every event."""

    def __init__(self, output: Path, state: State, minutes: float, processes: Processes):
        self.output, self._progress, self.minutes, self.processes = output, state, minutes, processes
        self.running: dict[str, J] = {}
        self._tries: dict[str, int] = {}
        self._seen = self._shown = time.monotonic()
        self._log = logging.getLogger(type(self).__name__.lower())
        state.failed.clear()  # what failed before may have been mended

    @abstractmethod
    def todo(self) -> Iterable[J]:
        """The jobs that are still to be trained and could start now, in the order in which they are wanted."""

    @abstractmethod
    def seconds(self, job: J) -> float:
        """The predicted seconds of a job."""

    @abstractmethod
    def decide(self) -> None:
        """Decides what the runs depend on that can only be measured. Called when nothing runs and nothing is to do."""

    @abstractmethod
    def command(self, job: J) -> tuple[str, list[str]]:
        """(module whose `main` trains the job, its arguments)."""

    @abstractmethod
    def finish(self, job: J, took: float, run: Run, loss: float) -> None:
        """Takes in a job that ended well after `took` seconds, with its total held-out loss."""

    def run(self) -> bool:
        """Train what is missing. Returns whether everything that was wanted is trained now."""
        stopped: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda n, _: stopped.append(n))
        while not stopped:
            self._tick()
            self._collect()
            if not self.running and not any(True for _ in self.todo()):
                self.decide()
                self.save()
            for job in self._startable()[: self.processes.free]:
                self._start(job)
            if not self.running:
                break
            time.sleep(0.5)
        self.processes.stop()
        self._collect()
        self._tick()
        if stopped:
            self._log.warning("%s: runs are saved, start again to go on", signal.Signals(stopped[0]).name)
            raise SystemExit(EXIT_PREEMPTED)
        return not any(True for _ in self.todo())

    def save(self) -> None:
        self._progress.save(self.output / "state.json")

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return 60 * self.minutes - self._progress.spent

    def directory(self, job: J) -> Path:
        return self.output / "runs" / job.id

    def _log_of(self, job: J) -> Path:
        return self.output / "logs" / f"{job.id.replace('/', '--')}.log"

    def _tick(self) -> None:
        now = time.monotonic()
        self._progress.spent += now - self._seen
        self._seen = now
        self.save()
        if now - self._shown > _SHOW_EVERY:
            self._shown = now
            share = 100 * self._progress.spent / (60 * self.minutes)
            self._log.info("%.0f %% of the time used; now: %s", share, ", ".join(self.running))

    def _startable(self) -> list[J]:
        begun = {job.id for job in self.todo() if (self.directory(job) / "status.json").exists()}
        return startable(self.todo(), self.processes.names, begun, self.seconds, self.left)

    def _start(self, job: J) -> None:
        self.processes.start(job.id, *self.command(job), self._log_of(job))
        self._log.info("start %s (rate %g, %d steps)", job.id, job.rate, job.steps)
        self.running[job.id] = job

    def _collect(self) -> None:
        """Take in the results of the jobs that have ended since the last call."""
        for ended in self.processes.ended():
            job = self.running.pop(ended.name)
            run = Run(self.directory(job))
            loss = run.lines[-1].get(f"val/{HELD_OUT}/loss/total") if ended.code == 0 else None
            if loss is not None and math.isfinite(loss):
                self.finish(job, ended.seconds, run, loss)
                self._log.info("done  %s: %.4f, %.0f s", job.id, loss, ended.seconds)
            elif ended.code not in (EXIT_PREEMPTED, -signal.SIGTERM):  # these two are no fault of the run
                self._tries[job.id] = self._tries.get(job.id, 0) + 1
                said = self._log_of(job).read_text(errors="replace").strip().rpartition("\n")[2]
                why = said if ended.code else "its held-out loss at the end is not finite"
                self._log.warning("%s ended with %d: %s", job.id, ended.code, why)
                if self._tries[job.id] == _TRIES:
                    self._progress.failed[job.id] = why
            self.save()

    def forget_checkpoints(self, job: J) -> None:
        """Remove the checkpoints of a run that nothing will be begun from."""
        shutil.rmtree(self.directory(job) / "checkpoints", ignore_errors=True)
        (self.directory(job) / "LATEST").unlink(missing_ok=True)


def step_seconds(run: Run, steps: int) -> float:
    """The seconds of a step of a run that is only timed: the median over its steps after the first ones."""
    per_token = statistics.median(1 / x["perf/tokens_per_s"] for x in run.lines[4:] if "perf/tokens_per_s" in x)
    return per_token * sum(v for k, v in run.lines[-1].items() if k.startswith("tokens/")) / steps


def as_overrides(values: dict[str, Any]) -> list[str]:
    """Values of config keys as `mom train` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
