"""Ranks that hang or lag: a dump of every thread's stack, and who keeps the others waiting."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from mom_tokenizers.errors import user_path


class Watch:
    """One rank's watch over its steps. A context manager.

    Where none begins for as long as `begin` said, the stacks of the rank's threads go to RUN/stacks/rank-N.txt, from a
    thread that needs no interpreter; the collective's own time-out, a little later, then ends the rank.
    """

    def __init__(self, run_dir: Path, rank: int):
        path = run_dir / "stacks" / f"rank-{rank}.txt"
        with user_path(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # appended to, because torchrun may start the rank again at once; open as long as the run, for faulthandler
            self._file = open(path, "a")  # noqa: SIM115
        self._waited = 0.0

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()

    def begin(self, timeout: float) -> None:
        """A step, or something else that may take this many seconds, begins."""
        faulthandler.dump_traceback_later(0.8 * timeout, file=self._file)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the other ranks."""
        begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begun

    def report(self, seconds: float) -> dict[str, float]:
        """What share of the last `seconds` ranks spent waiting for the slowest one, and which that is. Collective."""
        mine = torch.tensor([self._waited], dtype=torch.float64)
        all_R = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(all_R, mine)
        waited_R = torch.cat(all_R)
        self._waited = 0.0
        lost = (waited_R.max() - waited_R.min()).item()
        return {"perf/straggling": lost / max(seconds, 1e-9), "perf/slowest_rank": int(waited_R.argmin())}
