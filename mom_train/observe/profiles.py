"""Traces of steps by PyTorch's profiler, for chosen steps or on request."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from mom_train.config.observe import ObserveConfig
from mom_train.distributed.ranks import Ranks
from mom_train.observe.metrics import FailedWrites

log = logging.getLogger(__name__)
_LOOK_SECONDS = 1.0


class Requests:
    """Files by which somebody asks a run for something while it trains, such as RUN/profile.request. Rank 0 looks for
    them about once a second, because a network file system may take milliseconds to answer."""

    def __init__(self, run_dir: Path, ranks: Ranks):
        self._run_dir = run_dir if ranks.main else None
        self._next = 0.0

    def look(self, *names: str) -> dict[str, bool]:
        """Name -> whether RUN/NAME.request was there. It is removed. Always False on the other ranks, so that all ranks
        must agree on what follows."""
        found = dict.fromkeys(names, False)
        if self._run_dir is None or (now := time.monotonic()) < self._next:
            return found
        self._next = now + _LOOK_SECONDS
        for name in names:
            try:
                (self._run_dir / f"{name}.request").unlink()
                found[name] = True
            except FileNotFoundError:
                continue
            except OSError as error:
                log.warning("%s cannot be removed, so it is ignored: %s", self._run_dir / f"{name}.request", error)
        return found


class Profiles:
    """Records whole steps on this rank: one profiler at a time, and none between.

    A profiler warms up during the step before the first that it records, where there is one. The trace is written as
    RUN/profile/step-A-B/rank-R.json.gz, a Chrome trace that ui.perfetto.dev opens.
    """

    def __init__(self, config: ObserveConfig, run_dir: Path, ranks: Ranks, last: int):
        """`last` is the last step of the run, which no recording outlasts."""
        self._config, self._ranks, self._last = config, ranks, last
        self._folder = run_dir / "profile"
        self._mine = ranks.main or config.profile_ranks == "all"
        self._profile: profile | None = None
        self._steps = (0, 0)
        self._failed = FailedWrites()

    def begin(self, step: int, requested: bool) -> None:
        """The step with this number begins. `requested` must be the same on all ranks."""
        if self._profile is not None or not self._mine:
            if requested and self._mine:
                log.warning("profile.request is ignored: a profile is being recorded already")
            return
        if requested:
            self._start(step, min(step + 1, self._last), min(step + self._config.profile_request_steps, self._last))
        elif self._config.profile_steps is not None:
            first, last = self._config.profile_steps
            if step == max(first - 1, 1):
                self._start(step, first, min(last, self._last))

    def _start(self, step: int, first: int, last: int) -> None:
        if first > last:
            return
        activities = [ProfilerActivity.CPU]
        if self._ranks.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._steps = first, last
        planned = schedule(wait=0, warmup=first - step, active=last - first + 1, repeat=1)
        self._profile = profile(activities=activities, schedule=planned, on_trace_ready=self._write, record_shapes=True)
        self._profile.start()

    def _write(self, recorded: profile) -> None:
        path = self._folder / f"step-{self._steps[0]}-{self._steps[1]}" / f"rank-{self._ranks.rank}.json.gz"
        with self._failed.tolerated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))
            log.info("a trace of steps %d to %d is in %s", *self._steps, path)

    def end(self, step: int) -> None:
        """The step with this number has ended."""
        if self._profile is None:
            return
        self._profile.step()
        if step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Ends a recording that is under way. What it has recorded so far is written."""
        if (running := self._profile) is not None:
            self._profile = None
            running.stop()
