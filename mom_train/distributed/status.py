"""How a run stands, for whoever started it: RUN/status.json, written by rank 0, and the requests to end it."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from mom_tokenizers.errors import read_json

State = Literal["running", "preempted", "stopped", "finished", "failed"]
_STATUS_BYTES = 2048  # of status.json
AGENT_PID = "MOM_AGENT_PID"
"""Environment variable in which torchrun_launch's torchrun tells its ranks who it is."""


def write_status(run_dir: Path, state: State, step: int, steps: int, reason: str = "") -> None:
    """Replace the file whole. torchrun turns every exit code into 1, so this is what a launcher goes by:

    running     or it was killed and could say nothing
    preempted   asked to end; the checkpoint is committed, start it again
    stopped     at training.stop_at
    finished    at training.steps
    failed      `reason` says why, and the exit code whether starting it again may help (mom_tokenizers/errors.py)

    On a disk without space, where no second file can be written, the one that is there is written over in place; all
    have the same size, so that this needs no space. A longer `reason` is cut.
    """
    values = {"state": state, "step": step, "steps": steps, "reason": reason, "time": time.time()}
    while len(text := json.dumps(values)) >= _STATUS_BYTES:
        reason = reason[: -max(1, (len(text) - _STATUS_BYTES) // 6)]  # a character has up to 6 bytes, \u1234
        values["reason"] = f"{reason}..."
    content = f"{text:{_STATUS_BYTES - 1}}\n"
    partial, path = run_dir / ".status.partial", run_dir / "status.json"
    try:
        _write_through(partial, "w", content)
        partial.rename(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        if not path.exists():
            raise
        _write_through(path, "r+", content)


def _write_through(path: Path, mode: str, content: str) -> None:
    with open(path, mode) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_status(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "status.json"
    return read_json(path) if path.exists() else None


class Stop:
    """A request to end: by signal, or because the time is up. What every rank does about it is agreed before each step.

    Ctrl-C twice ends at once. The clock starts with the object.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._signal = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._request)

    def _request(self, number: int, _: object) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    @property
    def code(self) -> int:
        """0, the signal's number, or 128 when the time is up: ranks agree on the largest."""
        if self._signal:
            return self._signal
        return 128 if self._deadline is not None and time.monotonic() > self._deadline else 0

    @staticmethod
    def reason(code: int) -> str:
        return "training.time_limit is reached" if code == 128 else f"signal {signal.Signals(code).name}"
