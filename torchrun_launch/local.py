"""Starts a run on this machine, or on several machines without Slurm, through torchrun."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence

from mom_tokenizers.errors import UserError
from mom_train.config.files import load_config
from mom_train.config.preflight import check_places
from mom_train.distributed.status import read_status
from torchrun_launch.ranks import Agent, exit_code, rank_environment, rendezvous
from torchrun_launch.record import check_free, this_process, write_record


def launch(
    config: str,
    overrides: Sequence[str],
    environment: Mapping[str, str],
    *,
    ranks: int | None = None,
    nodes: str = "1",
    node_rank: int = 0,
    endpoint: str | None = None,
    run_id: str = "mom",
    max_restarts: int = 0,
    command: Sequence[str] = (),
    rendezvous_timeout: int = 600,
    shutdown_timeout: float = 300,
) -> int:
    """Run this node's ranks until they end. Returns the exit code that `ranks.exit_code` gives.

    Where `nodes` is not "1", the user runs the same command on each node with the same `endpoint`, HOST:PORT of the
    node with node_rank 0, which holds the rendezvous. `command` is what the user called, for the record. Before any
    rank starts, raises UserError for a wrong config and for paths that it needs and that do not exist.
    """
    loaded = load_config(config, overrides)
    check_places(loaded, ranks * int(nodes) if ranks is not None and nodes.isdigit() else None)
    run_dir = loaded.run_dir
    if ranks is None:
        import torch  # late: --help and config errors need no torch

        ranks = max(1, torch.cuda.device_count())
    if nodes == "1":
        # The address is given because in containers and on laptops a machine's own name often cannot be resolved.
        meeting = ["--standalone", "--local-addr=127.0.0.1"]
    elif endpoint is None:
        raise UserError(f"--nnodes {nodes} needs --rdzv-endpoint HOST:PORT, the same on every node")
    else:
        meeting = rendezvous(nodes, endpoint, run_id, rendezvous_timeout, hosts_it=node_rank == 0)
    torchrun = [*meeting, f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}"]
    log = None
    if not sys.stderr.isatty():  # on a terminal the ranks write to it themselves, with a progress bar
        log = run_dir / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-node{node_rank}-{os.getpid()}.log"
        torchrun += ["--tee=3", f"--log-dir={run_dir / 'logs'}"]
    if node_rank == 0:
        check_free(run_dir)
        logs = str(log.absolute()) if log else None
        write_record(run_dir, {"kind": "local", **this_process(), "logs": logs, "command": list(command)})
    cores = len(os.sched_getaffinity(0))
    before = read_status(run_dir)
    environment = {**environment, **rank_environment(ranks, cores, environment)}
    agent = Agent(torchrun, ["-m", "mom_train", config, *overrides], environment, log=log)
    code = agent.wait(shutdown_timeout)
    after = read_status(run_dir)
    return exit_code(code, after if after != before else None)
