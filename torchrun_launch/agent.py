"""python -m torchrun_launch.agent TORCHRUN_ARGUMENTS: torchrun, ending with its ranks' own exit code.

Started by torchrun_launch.ranks, which ignores the usual signals for it and passes them on to the ranks itself.
"""

from __future__ import annotations

import ctypes
import signal
import sys

from mom_data.errors import EXIT_USER_ERROR
from mom_train.status import EXIT_INCIDENT

ENDED_FOR_GOOD = (EXIT_USER_ERROR, EXIT_INCIDENT)  # started again, the run would end the same way
_PR_SET_PDEATHSIG = 1


def main() -> None:
    # a launcher that is killed outright must not leave ranks behind: torchrun ends them on SIGHUP
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    try:
        run.run(run.parse_args(["--signals-to-handle=SIGHUP", *sys.argv[1:]]))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for code in ENDED_FOR_GOOD:
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
