"""Tells whoever started a run how it stands (RUN/status.json, written by rank 0), and receives requests to end it."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from mom_tokenizers.errors import read_json

RunState = Literal["running", "preempted", "stopped", "finished", "failed"]
_STATUS_BYTES = 2048  # size of status.json
AGENT_PID = "MOM_AGENT_PID"
"""Environment variable in which the torchrun that torchrun_launch starts gives its ranks its process id."""


def write_status(run_dir: Path, state: RunState, step: int, steps: int, reason: str = "") -> None:
    """Replaces RUN/status.json. A launcher relies on it, because torchrun turns every exit code into 1. The states are

    running     the run trains, or it was killed and could not say so
    preempted   the run was asked to end and its checkpoint is committed: start it again
    stopped     the run reached training.stop_at
    finished    the run reached training.steps
    failed      `reason` says why; the exit code says whether starting it again may help (mom_tokenizers/errors.py)

    On a full disk, where no second file can be written, the existing file is overwritten in place. This needs no space
    because all versions of it have the same size; a `reason` that is too long is cut.
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
    """The values that `write_status` wrote, or None if there is no such file."""
    path = run_dir / "status.json"
    return read_json(path) if path.exists() else None


class Stop:
    """Notes whether this rank was asked to end: by a signal, or because `seconds` have passed since the object was
    made.

    The ranks agree before each step on what to do about it. Pressing Ctrl-C twice ends the process at once.
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
        """0 for no request, the number of the signal, or 128 if the time is up. The ranks agree on the largest."""
        if self._signal:
            return self._signal
        return 128 if self._deadline is not None and time.monotonic() > self._deadline else 0

    @staticmethod
    def reason(code: int) -> str:
        """The request of this `code` in words."""
        return "training.time_limit is reached" if code == 128 else f"signal {signal.Signals(code).name}"
