"""Ranks on this machine: torchrun, with the environment that training wants."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence

from mom_train.config import load_config

EXIT_USER_ERROR = 2


def rank_environment(ranks: int, cores: int, given: Mapping[str, str]) -> dict[str, str]:
    """Settings for every rank; whatever the user has set stays."""
    wanted = {
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        # spinning OpenMP threads of several ranks slow each other down many times over
        "OMP_WAIT_POLICY": "passive",
        # page faults dominate large elementwise operations on the CPU
        "THP_MEM_ALLOC_ENABLE": "1",
    }
    return {name: value for name, value in wanted.items() if name not in given}


def launch(config: str, overrides: Sequence[str], ranks: int | None, environment: MutableMapping[str, str]) -> int:
    """Run the ranks to their end; returns the exit code: 0, 2 for an error that the user can mend, 1 otherwise.

    The config is checked before any rank starts.
    """
    load_config(config, overrides)
    from torch.distributed import run  # late: --help and config errors need no torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if ranks is None:
        import torch

        ranks = max(1, torch.cuda.device_count())
    environment.update(rank_environment(ranks, len(os.sched_getaffinity(0)), environment))
    arguments = ["--standalone", f"--nproc-per-node={ranks}", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2"]
    try:
        run.run(run.parse_args([*arguments, "-m", "mom_train", config, *overrides]))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if EXIT_USER_ERROR in codes:
            return EXIT_USER_ERROR
        print(f"torchrun_launch: a rank failed: {error.get_first_failure()[1].message}")
        return 1
    return 0
