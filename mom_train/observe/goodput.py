"""Accounts for the wall time of a run: the share that went into steps now in the run, and where the rest went.

Rank 0 is in one state at a time. Each attempt (each start of the run) appends the time spent in its states to a file of
its own, RUN/goodput/attempt-N.jsonl. Reading these files in order gives the account: a step counts where it was trained
last, because a run that was killed or that went back to a checkpoint trains some steps again. All durations are whole
nanoseconds of the monotonic clock, and the parts partition the wall time, so that they add up to it exactly.

Reading needs no torch. mom_train/observe/timeline.py writes the files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

PARTS = {
    "train": "steps that are in the run",
    "repeated": "steps that were lost to a kill or a rollback and trained again",
    "skipped": "bad steps, whose update was skipped",
    "first_step": "first step of each start, with compilation",
    "start": "starts: imports, model, reading the checkpoint",
    "data": "waiting for data",
    "validation": "validation",
    "samples": "samples",
    "checkpoints": "checkpoints",
    "logging": "writing figures, and ending",
    "queue": "waiting in Slurm's queue",
    "down": "down between attempts",
}
"""The parts of the wall time, and what each is, in words."""


class Account:
    """The replay of the lines of all attempts, in order."""

    def __init__(self) -> None:
        self.attempts = 0
        self.from_step: int | None = None
        """The step that the first recorded attempt began after. Steps before it are not in the account."""
        self._parts = dict.fromkeys(PARTS, 0)
        self._kept: list[tuple[int, int, int]] = []  # (first step, last step, ns of training), in order of steps
        self._end = 0  # wall clock at the end of what was read, in ns
        self._attempt_end = 0  # the same on the clock of the attempt

    def add(self, line: Mapping[str, Any]) -> None:
        """Takes in one line of an attempt's file."""
        if "began" in line:
            self._begin(line)
        elif "back_to" in line:
            self._lose(line["back_to"])
        elif "skipped" in line:
            self._skip(*line["skipped"])
        else:
            self._spend(line)

    def _begin(self, line: Mapping[str, Any]) -> None:
        began = line["began"]
        waited_since, job_began = line.get("submitted"), line.get("job_began")
        if not self.attempts:
            self.from_step = line["step"]
            self._end = began if waited_since is None or job_began is None else min(waited_since, began)
        self.attempts += 1
        # Clocks of machines differ a little: an attempt that seems to begin before the last one ended begins there.
        began = max(began, self._end)
        if job_began is not None and (queue := min(job_began, began) - max(self._end, waited_since or 0)) > 0:
            self._parts["queue"] += queue
            self._parts["start"] += began - min(job_began, began)
            self._parts["down"] += min(job_began, began) - queue - self._end
        else:
            self._parts["down"] += began - self._end
        self._end, self._attempt_end = began, 0
        self._lose(line["step"])

    def _lose(self, step: int) -> None:
        """The run goes on from `step`, so what was trained after it is trained again."""
        while self._kept and self._kept[-1][1] > step:
            first, last, ns = self._kept.pop()
            kept = ns * max(0, step - first + 1) // (last - first + 1)
            self._parts["train"] -= ns - kept
            self._parts["repeated"] += ns - kept
            if kept:
                self._kept.append((first, step, kept))

    def _skip(self, step: int, ns: int) -> None:
        """The update of `step`, which took `ns` nanoseconds, was skipped."""
        for place in range(len(self._kept) - 1, -1, -1):
            first, last, spent = self._kept[place]
            if first <= step <= last:
                ns = min(ns, spent)
                self._kept[place] = (first, last, spent - ns)
                self._parts["train"] -= ns
                self._parts["skipped"] += ns
                return

    def _spend(self, line: Mapping[str, Any]) -> None:
        for state, ns in line["ns"].items():
            self._parts[state] += ns
            self._end += ns
            self._attempt_end += ns
        trained = line["ns"].get("train", 0)
        if "steps" in line:
            self._kept.append((*line["steps"], trained))
        else:  # a step that did not end
            self._parts["train"] -= trained
            self._parts["repeated"] += trained

    def result(self) -> dict[str, Any]:
        """The account in seconds: `wall_s`, `parts_s` by part, `goodput` (the share of "train"), `attempts`,
        `from_step`, `last_step` (the last one that is in the run) and `until` (Unix time of the last record).
        `wall_ns` and `parts_ns` are the same times in nanoseconds, of which the parts add up exactly."""
        wall = sum(self._parts.values())
        return {
            "goodput": self._parts["train"] / wall if wall else 0.0,
            "wall_s": wall / 1e9,
            "parts_s": {part: ns / 1e9 for part, ns in self._parts.items()},
            "wall_ns": wall,
            "parts_ns": dict(self._parts),
            "attempts": self.attempts,
            "from_step": self.from_step,
            "last_step": self._kept[-1][1] if self._kept else self.from_step,
            "until": self._end / 1e9,
        }


def attempt_files(run_dir: Path) -> list[Path]:
    """The files of the attempts, the first one first."""
    return sorted((run_dir / "goodput").glob("attempt-*.jsonl"), key=lambda path: int(path.stem.split("-")[1]))


def read_account(run_dir: Path) -> Account:
    """The account of a run so far. It is empty where the run recorded nothing. What a crash cut short at the end of an
    attempt's file is left out, and its time counts as "down" if the run is started again."""
    account = Account()
    for path in attempt_files(run_dir):
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                values = json.loads(line)
            except ValueError:  # a machine that crashes may leave bytes that were never written
                log.warning("%s: what follows its first damaged line is left out", path)
                break
            account.add(values)
    return account


def goodput(run_dir: Path) -> dict[str, Any] | None:
    """`Account.result` of a run, or None where the run recorded nothing."""
    account = read_account(run_dir)
    return account.result() if account.attempts else None


def described(result: Mapping[str, Any]) -> str:
    """The account in one line of text, the largest parts first."""
    wall = result["wall_s"] or 1.0
    parts = sorted(((s, p) for p, s in result["parts_s"].items() if p != "train"), reverse=True)
    rest = ", ".join(f"{PARTS[part]} {seconds / wall:.1%}" for seconds, part in parts if seconds / wall >= 0.001)
    attempts = f"{result['attempts']} attempt{'s' if result['attempts'] > 1 else ''}"
    trained = f"goodput {result['goodput']:.1%} of {result['wall_s'] / 3600:.2f} h in {attempts}"
    return f"{trained}; the rest: {rest}" if rest else trained
