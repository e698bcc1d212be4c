"""Records what rank 0 spends its time on, in the file of this attempt that mom_train/observe/goodput.py reads."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from mom_tokenizers.errors import user_path
from mom_tokenizers.files import write_whole
from mom_train.distributed.process import process_age
from mom_train.observe.goodput import attempt_files, described, read_account
from mom_train.observe.metrics import FailedWrites, Lines

log = logging.getLogger(__name__)

State = Literal["start", "first_step", "train", "data", "validation", "samples", "checkpoints", "logging"]

_FLUSH_NS = 1_000_000_000
_ALIGNED = ("validation", "samples", "checkpoints")


class Timeline:
    """Records the states of this attempt, from the start of the process on. Without `run_dir` it does nothing, so that
    all ranks can call it alike.

    The times of steps are written about once a second, and before and after everything else. A line therefore never
    reaches across a checkpoint, and a run that goes back to one loses whole lines.
    """

    def __init__(self, run_dir: Path | None, step: int):
        """The attempt goes on from the checkpoint of `step`. Raises UserError where RUN cannot be written."""
        self._run_dir, self._lines = run_dir, None
        if run_dir is None:
            return
        self.account = read_account(run_dir)
        files = attempt_files(run_dir)
        number = int(files[-1].stem.split("-")[1]) + 1 if files else 1
        self._path = run_dir / "goodput" / f"attempt-{number}.jsonl"
        self._failed = FailedWrites()
        with user_path(self._path):
            self._path.parent.mkdir(exist_ok=True)
            self._lines = Lines(self._path)
        age = process_age()
        self._last = time.monotonic_ns() - age
        self._flushed = self._last
        self._state: State = "start"
        self._ns: dict[str, int] = {}
        self._steps: tuple[int, int] | None = None
        self._step_ns = 0  # training time of the present step
        self._done: tuple[int, int] | None = None  # the last step, and its training time
        self._stepped = False
        self._write({"began": time.time_ns() - age, "step": step, **_slurm_times(run_dir)})

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._lines is not None
        self.account.add(line)
        with self._failed.tolerated(self._path):
            self._lines.append(json.dumps(line))

    def enter(self, state: State) -> None:
        """Ends the present state and begins another one."""
        if self._lines is None:
            return
        now = time.monotonic_ns()
        self._ns[self._state] = self._ns.get(self._state, 0) + now - self._last
        if self._state == "train":
            self._step_ns += now - self._last
        if (state in _ALIGNED or self._state in _ALIGNED) and state != self._state:
            self._flush(now)
        self._state, self._last = state, now

    def train(self) -> None:
        """A step begins, once its data is there."""
        if self._lines is not None:
            self.enter("train" if self._stepped else "first_step")

    @contextmanager
    def during(self, state: State) -> Iterator[None]:
        """A context for work of another kind. The state before it goes on behind it."""
        before: State = "logging" if self._lines is None else self._state
        self.enter(state)
        try:
            yield
        finally:
            self.enter(before)

    def trained(self, step: int) -> None:
        """The step with this number has been trained."""
        if self._lines is None:
            return
        self.enter("logging")
        self._stepped = True
        self._steps = (self._steps[0] if self._steps else step, step)
        self._done, self._step_ns = (step, self._step_ns), 0
        if self._last - self._flushed >= _FLUSH_NS:
            self._flush(self._last)

    def skipped(self) -> None:
        """The update of the last trained step was skipped, because the step was bad."""
        if self._lines is None or self._done is None:
            return
        self._flush_steps()
        self._write({"skipped": list(self._done)})
        self._done = None

    def back_to(self, step: int) -> None:
        """The run goes back to the checkpoint of `step`."""
        if self._lines is not None:
            self._give_up_step("start")
            self._write({"back_to": step})

    def _give_up_step(self, state: State) -> None:
        """Writes everything up to now, with a step that is under way as a step that did not end."""
        self.enter(state)
        self._flush_steps()
        self._step_ns = 0
        self._flush(self._last)

    def _flush_steps(self) -> None:
        """Writes the steps that have ended. The time of the one that is under way stays for the next line."""
        under_way = {"train": self._step_ns} if self._step_ns else {}
        if self._step_ns:
            self._ns["train"] -= self._step_ns
        self._flush(self._last)
        self._ns |= under_way

    def _flush(self, now: int) -> None:
        if self._ns:
            line: dict[str, Any] = {"ns": self._ns}
            if self._steps is not None:
                line["steps"] = self._steps
            self._write(line)
        self._ns, self._steps, self._flushed = {}, None, now

    def figures(self) -> dict[str, float]:
        """What is logged: the goodput so far, and the share of each part that is not 0."""
        if self._lines is None:
            return {}
        result = self.account.result()
        if not result["wall_ns"]:
            return {}
        shares = {part: ns / result["wall_ns"] for part, ns in result["parts_ns"].items() if ns}
        return {"perf/goodput": result["goodput"], **{f"perf/time/{part}": share for part, share in shares.items()}}

    def save(self) -> None:
        """Writes the account so far to RUN/goodput.json."""
        if self._run_dir is not None:
            path = self._run_dir / "goodput.json"
            with self._failed.tolerated(path):
                write_whole(path, json.dumps(self.account.result(), indent=1) + "\n")

    def close(self) -> None:
        """Ends the record of this attempt."""
        if self._lines is None:
            return
        self._give_up_step("logging")
        self.save()
        log.info("%s", described(self.account.result()))
        self._lines.close()
        self._lines = None


def _slurm_times(run_dir: Path) -> dict[str, int]:
    """When the Slurm job of this process was submitted by `mom submit`, and when Slurm started it, in ns of the wall
    clock, as far as both are known. A job that was put back into the queue keeps its time of submission."""
    job, began = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_START_TIME", "")
    try:
        launch = json.loads((run_dir / "launch.json").read_text())
        submitted = int(launch["time"] * 1e9)
        known = launch["kind"] == "slurm" and str(launch["job"]) == job
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known or not began.isdigit():
        return {}
    return {"submitted": submitted, "job_began": int(began) * 1_000_000_000}
