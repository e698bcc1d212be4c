"""Starts runs by their public commands, and compares what they leave."""

import json
import subprocess
import sys

from tests.helpers import CHECKOUT
from tests.helpers.ranks import mom_train, mom_train_ranks

VOLATILE = ("perf/", "checkpoint/")


def command(config, *overrides, ranks=2):
    launcher = [sys.executable, "-m", "torchrun_launch", "local", f"--nproc-per-node={ranks}"]
    return [*launcher, str(config), *overrides]


def run(config, *overrides, ranks=2, code=0, torchrun=False):
    """Train, and require that every rank ends with the exit code `code`. Returns what the ranks print, rank 0 first.
    With torchrun=True the launcher starts the run, as a user would. Otherwise ranks are forked from a process that has
    imported torch, and ranks=0 means one process without a process group."""
    if torchrun:
        done = subprocess.run(command(config, *overrides, ranks=ranks), cwd=CHECKOUT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr[-3000:]
        return done.stderr
    ended = mom_train_ranks(ranks, None, config, *overrides, timeout=900) if ranks else [mom_train(config, *overrides)]
    said = "".join(printed for _, printed in ended)
    assert {exit_code for exit_code, _ in ended} == {code}, said[-3000:]
    return said


def metrics(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(VOLATILE)} for line in lines]


def weights(run_dir):
    """All tensors of the newest checkpoint, read by torch's own converter."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    out = run_dir / "weights.pt"
    dcp_to_torch_save(run_dir / "checkpoints" / (run_dir / "LATEST").read_text().strip(), out)
    import torch

    return torch.load(out, weights_only=True)


def assert_equal_tensors(a, b):
    import torch

    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            assert_equal_tensors(a[key], b[key])
        elif isinstance(a[key], torch.Tensor):
            assert torch.equal(a[key], b[key]), key
