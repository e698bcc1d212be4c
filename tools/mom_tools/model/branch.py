"""Begin a decay branch: a new run that takes over everything from a checkpoint of another run, the trunk, and lets the
learning rate fall from there. The trunk is not changed, and may go on training meanwhile.

    mom branch RUN --at STEP --decay 2000 run_dir=runs/branch [--shape sqrt] [key=value ...]

STEP is a step at which the trunk had its peak rate and a checkpoint. The branch has the trunk's settings, except for
those that are given. It writes its config, takes the checkpoint, and trains in this process; with --write-only it
leaves that to `mom local` or `mom submit`. The same command carries on with a branch that was interrupted.
"""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mom_tokenizers.errors import UserError, exit_clearly, user_path
from mom_tools.options import command_parser
from mom_train.config.branch import BranchConfig
from mom_train.config.files import overridden, read_saved, validated
from mom_train.config.preflight import check_run, check_writable, is_local
from mom_train.config.run import RunConfig
from mom_train.distributed.run_lock import RunLock

_DECIDED = ("training.steps", "optimizer.schedule", "optimizer.decay", "optimizer.decay_shape")


def check_stable(trunk: RunConfig, step: int) -> None:
    """Raises UserError if the rate of the trunk rises or falls at this step."""
    optimizer, steps = trunk.optimizer, trunk.training.steps
    if step < optimizer.warmup:
        raise UserError(f"--at {step}: the trunk is in its warm-up until step {optimizer.warmup}")
    if optimizer.schedule == "cosine":
        raise UserError(
            f"--at {step}: the trunk's learning rate falls along a cosine from step {optimizer.warmup} on. A trunk "
            "needs optimizer.schedule: constant or wsd"
        )
    if optimizer.decay is not None and step > steps - optimizer.decay:
        raise UserError(f"--at {step}: the trunk's learning rate falls from step {steps - optimizer.decay} on")


def branch_config(
    trunk: RunConfig, branch: BranchConfig, decay: int, shape: str, overrides: Sequence[str]
) -> RunConfig:
    """The config of a branch. Raises UserError if an override contradicts the other arguments."""
    keys = {override.partition("=")[0] for override in overrides}
    for key in sorted(keys):
        if key in (*_DECIDED, "training", "optimizer") or key.partition(".")[0] == "branch":
            raise UserError(f"{key}: --at, --decay and --shape decide it")
    if trunk.checkpoint.path is not None and "checkpoint.path" not in keys:
        raise UserError(
            f"the trunk's checkpoints are in {trunk.checkpoint.path}: name another place for the branch's with "
            "checkpoint.path=..., or checkpoint.path=null for its run_dir"
        )
    values: dict[str, Any] = trunk.model_dump(mode="json")
    values["branch"] = branch.model_dump()
    values["training"] |= {"steps": branch.step + decay, "stop_at": None}
    values["optimizer"] |= {"schedule": "wsd", "decay": decay, "decay_shape": shape}
    return validated(overridden(values, overrides), "the branch")


def check_same_branch(run_dir: Path, there: dict[str, Any], branch: BranchConfig, decay: int, shape: str) -> None:
    """Raises UserError if `run_dir`, whose saved config is `there`, belongs to another run than this branch, or if the
    branch was begun with another shape."""
    same = there.get("branch") == branch.model_dump() and there["optimizer"].get("decay") == decay
    if not same and (there or (run_dir / "checkpoints").exists()):
        raise UserError(f"run_dir: {run_dir} is the folder of another run; name one that is not there yet")
    begun = there["optimizer"].get("decay_shape", shape) if there else shape
    if begun != shape:
        raise UserError(f"run_dir: {run_dir} was begun with --shape {begun}, and this is --shape {shape}")


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("run", help="the trunk: its folder, or the URL of its checkpoints")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="run_dir=..., and settings that differ")
    parser.add_argument("--at", type=int, required=True, metavar="STEP", help="step of the trunk's checkpoint")
    parser.add_argument("--decay", type=int, required=True, metavar="N", help="steps over which the rate falls")
    parser.add_argument(
        "--shape", choices=("linear", "sqrt", "cosine"), default="linear", help="(default: %(default)s)"
    )
    parser.add_argument("--write-only", action="store_true", help="write the branch's config and do not train")
    arguments = parser.parse_intermixed_args()
    with exit_clearly():
        for option, value in {"--at": arguments.at, "--decay": arguments.decay}.items():
            if value < 1:
                raise UserError(f"{option} {value}: at least 1")
        check_run(arguments.run)
        from mom_train.checkpoint.branch import adopt, trunk_checkpoint
        from mom_train.checkpoint.store import Checkpoints

        trunk = str(Path(arguments.run).resolve()) if is_local(arguments.run) else arguments.run
        branch = BranchConfig(run=trunk, step=arguments.at)
        run_dir = overridden({}, arguments.overrides).get("run_dir")
        if not isinstance(run_dir, str) or not run_dir:
            raise UserError("run_dir=...: name the folder of the branch")
        there = read_saved(run_dir)
        check_same_branch(Path(run_dir), there, branch, arguments.decay, arguments.shape)
        if there:  # the branch goes on, and the trunk may have removed its checkpoint since
            base = validated(there, run_dir)
        else:
            base = trunk_checkpoint(branch).config()
            check_stable(base, arguments.at)
        config = branch_config(base, branch, arguments.decay, arguments.shape, arguments.overrides)
        check_writable(config.run_dir, "run_dir")
        path = config.run_dir / "config.yaml"
        with RunLock(config.run_dir), user_path(path):
            path.write_text(config.to_yaml())
            checkpoints = Checkpoints(config.checkpoint.path or config.run_dir)
            if not checkpoints.committed():
                adopt(branch, checkpoints)
    if arguments.write_only:
        print(f"{path} is written. Start the branch with one of:\n  mom train {path}\n  mom local {path}\n"
              f"  mom submit --nodes N --gpus-per-node G {path}")  # fmt: skip
        return
    from mom_train.__main__ import main as train

    sys.argv = ["mom train", str(path)]
    train()


if __name__ == "__main__":
    main()
