"""python -m mom_train CONFIG [key=value ...] trains on one rank. torchrun and torchrun_launch start it on several."""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import signal
import sys

from mom_tokenizers.errors import exit_clearly
from mom_train.config.files import load_config
from mom_train.config.preflight import check_places
from mom_train.distributed.status import AGENT_PID

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="mom_train", description="Start a training run or continue one.")
    parser.add_argument("config", help="YAML file, such as configs/demo.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes of the config, such as training.steps=100"
    )
    arguments = parser.parse_args()
    rank = int(os.environ.get("RANK", 0))
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        # If torchrun is killed, its ranks must end too, or they would train on beside those that are started next.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # It may have been killed before that call.
        if os.environ.get(AGENT_PID, str(os.getppid())) != str(os.getppid()):
            sys.exit(1)
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s [rank {rank}] %(message)s",
        datefmt="%H:%M:%S",
    )
    with exit_clearly():
        config = load_config(arguments.config, arguments.overrides)
        check_places(config, int(os.environ.get("WORLD_SIZE", 1)))
        gc.disable()  # importing makes no garbage, and looking for it takes a fifth of the time
        from mom_train.trainer import train  # imports torch, so late that errors above are reported at once

        gc.freeze()  # modules stay until the end, so the garbage collector need not look at them
        gc.enable()
        sys.exit(train(config))


if __name__ == "__main__":
    main()
