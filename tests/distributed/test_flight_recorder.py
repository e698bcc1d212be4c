"""A rank that hangs in a collective operation leaves a record that PyTorch's own analyser reads."""

import argparse
import os
import time
from datetime import timedelta
from pathlib import Path

from tests.helpers.ranks import run_ranks


def waits_for_rank_1(folder):
    import torch
    import torch.distributed as dist

    from mom_train.distributed.flight_recorder import record_nccl
    from mom_train.distributed.watch import Watch

    folder = Path(folder)
    record_nccl(folder)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    dist.all_reduce(torch.ones(3))
    begun = dist.all_reduce(torch.ones(5), async_op=True) if rank == 0 else None
    with Watch(folder, rank) as watch:
        watch.begin(0.5)
        if begun is None:  # comes only once both have written their records
            while not all((folder / f"stacks/collectives/rank_{r}").exists() for r in (0, 1)):
                time.sleep(0.02)
            begun = dist.all_reduce(torch.ones(5), async_op=True)
        begun.wait()
    dist.destroy_process_group()
    return os.environ["TORCH_FR_DUMP_TEMP_FILE"]


def test_a_rank_that_waits_in_a_collective_leaves_its_last_operations_for_torchfrtrace(tmp_path):
    from torch.distributed.flight_recorder.components.loader import read_dir

    places = run_ranks(2, waits_for_rank_1, str(tmp_path))
    assert places == [f"{tmp_path}/stacks/nccl/rank_"] * 2
    found, version = read_dir(argparse.Namespace(trace_dir=str(tmp_path / "stacks/collectives"), prefix=None))
    assert version
    assert found.keys() == {"rank_0", "rank_1"}

    def sizes(rank):
        return [e["input_sizes"] for e in found[f"rank_{rank}"]["entries"] if "all_reduce" in e["profiling_name"]]

    assert sizes(0) == [[[3]], [[5]]]  # it is in the second operation
    assert sizes(1) == [[[3]]]  # which this one has not begun
