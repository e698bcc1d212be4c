"""python -m torchrun_launch.agent TORCHRUN_ARGUMENTS: torchrun, ending with its ranks' own exit code.

Ranks that ended with a code that says the error would repeat are not started again.

Started by torchrun_launch.ranks, which ignores the usual signals for it and passes them on to the ranks itself.
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

_ORPHANED_SECONDS = 40  # torchrun gives ranks 30 of them


def children(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found.update(int(child) for child in task.read_text().split())
        except OSError:
            continue
    return found


def _end_without(launcher: int) -> None:
    """A launcher that dies has the kernel send SIGHUP, on which torchrun ends its ranks. Python raises what that does
    wherever it happens to be: in a destructor it is lost, between a lock and its `with` it leaves torchrun waiting for
    ever. So this looks as well."""
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
        """torchrun's own starts ranks again whatever they ended with."""

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
