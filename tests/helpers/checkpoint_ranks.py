"""The work of the ranks in test_checkpoint.py: they save and load a small sharded model, its optimiser and average."""

import contextlib
import os
import subprocess
from pathlib import Path


@contextlib.contextmanager
def a_run(root, dim=32, **config):
    """(checkpointer, model, optimizer, ema, change) on this rank. `change(seed)` takes an optimiser step whose
    gradients do not depend on the number of ranks."""
    import torch
    from torch.distributed.tensor import distribute_tensor

    from mom_train.checkpoint.saver import Checkpointer
    from mom_train.checkpoint.store import Checkpoints
    from mom_train.config.model import ModelConfig
    from mom_train.config.optimizer import OptimizerConfig
    from mom_train.config.run import CheckpointConfig
    from mom_train.distributed.ranks import process_group
    from mom_train.model.init import initialize
    from mom_train.model.language_model import LanguageModel
    from mom_train.model.sharding import shard
    from mom_train.optim.ema import Ema
    from mom_train.optim.optimizer import build_optimizer

    with process_group() as ranks:
        with torch.device("meta"):
            model = LanguageModel(ModelConfig(dim=dim, layers=1, decoupled=("in_proj", "out_proj")), 192, 3)
        shard(model, ranks.mesh)
        model.to_empty(device="cpu")
        initialize(model, 0)
        optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.01))
        ema = Ema(model, 0.9)

        def change(seed):
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                gradient = torch.randn(p.shape, generator=generator)
                p.grad = distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)
            optimizer.step()
            ema.update(seed)

        with Checkpointer(Checkpoints(root), CheckpointConfig(**config)) as checkpointer:
            yield checkpointer, model, optimizer, ema, change


def everything(model, optimizer, ema):
    """All tensors by name, whole and as numpy arrays."""
    found = {}
    for name, p in model.named_parameters():
        found[f"model.{name}"] = p
        found |= {f"optimizer.{name}.{k}": v for k, v in optimizer.state[p].items()}
        found[f"ema.{name}"] = ema.average[name]
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().numpy().copy() for n, t in found.items()}


def save_steps(root, steps, config, environment=()):
    """Save at several steps while the weights change during each save. Returns {step: tensors at the time of the
    save}."""
    from mom_train.checkpoint.saver import TrainState

    os.environ.update(environment)
    saved = {}
    with a_run(root, **config) as (checkpointer, model, optimizer, ema, change):
        change(1)
        for step in steps:
            saved[step] = everything(model, optimizer, ema)
            checkpointer.save(model, optimizer, ema, TrainState(step=step))
            checkpointer.staged()
            change(step + 1)
        checkpointer.wait()
        assert checkpointer.committed_step == steps[-1]
    return saved


def load_newest(root, environment=()):
    """(step, tensors) of the newest checkpoint, or the message that the user gets where it cannot be loaded."""
    os.environ.update(environment)
    with a_run(root) as (checkpointer, model, optimizer, ema, _):
        try:
            newest = checkpointer.newest()
            assert newest is not None
            checkpointer.load(newest, model, optimizer, ema)
        except ValueError as error:
            return str(error)
        return newest.step, everything(model, optimizer, ema)


def step_to_carry_on_from(root):
    with a_run(root) as (checkpointer, *_):
        return checkpointer.newest().step


def save_two_large(root):
    """Save two checkpoints of tens of megabytes per rank. Returns the newest committed step."""
    from mom_train.checkpoint.saver import TrainState

    with a_run(root, dim=512) as (checkpointer, model, optimizer, ema, change):
        change(1)
        checkpointer.save(model, optimizer, ema, TrainState(step=1))
        checkpointer.wait()
        checkpointer.save(model, optimizer, ema, TrainState(step=2))
        checkpointer.wait()
        return checkpointer.committed_step


def save_on_a_bad_disk(folder):
    """Save on a small tmpfs with room, without room, with room again, and read-only. Returns what happened at each
    save."""
    import torch.distributed as dist

    from mom_train.checkpoint.saver import TrainState

    folder, happened = Path(folder), []

    def on_rank_0(work):
        if dist.get_rank() == 0:
            work()
        dist.barrier()

    def fill():
        with contextlib.suppress(OSError), open(folder / "filler", "wb") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()

    with a_run(folder, max_failures=2) as (checkpointer, model, optimizer, ema, change):

        def save(step):
            change(step)
            checkpointer.save(model, optimizer, ema, TrainState(step=step))
            checkpointer.wait()
            dist.barrier()  # rank 0 tidies up after a failed save
            happened.append((step, checkpointer.committed_step, (folder / "LATEST").read_text()))
            happened.append(sorted(p.name for p in (folder / "checkpoints").iterdir()))

        save(1)
        on_rank_0(fill)
        save(2)
        on_rank_0(lambda: (folder / "filler").unlink())
        save(3)
        on_rank_0(lambda: subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True))
        save(4)
        try:
            save(5)
        except ValueError as error:
            happened.append(str(error))
    return happened


def bests(root, story):
    """Save each (step, loss[, "fails"]) of a run that keeps the newest checkpoint and the best one. Returns (BEST,
    steps of the committed checkpoints) after each."""
    import torch.distributed as dist

    from mom_train.checkpoint.saver import TrainState

    root, seen = Path(root), []
    with a_run(root, keep=1, best="val/held/loss/total") as (checkpointer, model, optimizer, ema, change):
        for step, loss, *fails in story:
            change(step)
            checkpointer.improves(step, {"val/held/loss/total": loss})
            if fails and dist.get_rank() == 0:
                (root / f"checkpoints/step-{step}").write_text("in the way\n")
            dist.barrier()
            checkpointer.save(model, optimizer, ema, TrainState(step=step))
            checkpointer.wait()
            dist.barrier()
            committed = [c.step for c in checkpointer.checkpoints.committed()]
            seen.append(((root / "BEST").read_text().strip(), committed))
            dist.barrier()
    return seen


def train(config):
    import mom_train.trainer

    mom_train.trainer.train(config)
