"""Runs torchrun and ends with the exit code of its ranks: python -m torchrun_launch.agent TORCHRUN_ARGUMENTS

Ranks are not started again where their exit code says that the error would repeat.

torchrun_launch.ranks starts this program. It makes it ignore the usual signals, and passes them on to the ranks itself.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from mom_tokenizers.errors import NOT_RESTARTED
from mom_train.distributed.status import AGENT_PID

_ORPHANED_SECONDS = 40  # more than the 30 s that torchrun gives its ranks to end


def children(pid: int) -> set[int]:
    """The process ids of a process's children."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found.update(int(child) for child in task.read_text().split())
        except OSError:
            continue
    return found


def _end_without(launcher: int) -> None:
    """End this process and its ranks once the launcher has died.

    When the launcher dies, the kernel sends SIGHUP, on which torchrun ends its ranks by raising an exception wherever
    Python happens to be. In a destructor that exception is lost, and right after taking a lock it leaves torchrun
    waiting for ever. Therefore this thread watches for the launcher's death too.
    """
    while os.getppid() == launcher:
        time.sleep(1)
    time.sleep(_ORPHANED_SECONDS)
    for rank in children(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
    os._exit(1)


def main() -> None:
    os.environ[AGENT_PID] = str(os.getpid())
    threading.Thread(target=_end_without, args=(os.getppid(),), daemon=True).start()
    from torch.distributed import run
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher import api

    class Agent(LocalElasticAgent):
        """torchrun's agent, changed so that it considers the exit code of ranks before it starts them again."""

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result = super()._monitor_workers(worker_group)
            if any(failure.exitcode in NOT_RESTARTED for failure in result.failures.values()):
                self._remaining_restarts = 0
            return result

    api.LocalElasticAgent = Agent  # type: ignore[misc]
    try:
        run.run(run.parse_args(["--signals-to-handle=SIGHUP", *sys.argv[1:]]))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for code in NOT_RESTARTED:
            if code in codes:
                sys.exit(code)
        rank, failure = error.get_first_failure()
        print(f"torchrun_launch: rank {rank} failed: {failure.message}", file=sys.stderr)
        sys.exit(1)
    except RendezvousError as error:
        print(f"torchrun_launch: not all nodes came together in time: {error!r}", file=sys.stderr)
        sys.exit(1)
    except SignalException:
        sys.exit(1)


if __name__ == "__main__":
    main()
