"""What the ranks of test_muon.py do: steps of Muon with gradients that do not depend on the number of ranks."""

import contextlib


@contextlib.contextmanager
def a_model(model_config, optimizer_config, shard_ranks=None):
    """(model, optimizer, step) on this rank. `step(seed, silent)` takes one step with random gradients, which are zero
    in the rows of modality `silent`."""
    import torch
    from torch.distributed.tensor import distribute_tensor

    from mom_train.distributed.ranks import model_mesh, process_group
    from mom_train.model.init import initialize
    from mom_train.model.language_model import LanguageModel
    from mom_train.model.sharding import shard
    from mom_train.optim.optimizer import build_optimizer

    torch.set_num_threads(1)
    with process_group() as ranks:
        with torch.device("meta"):
            model = LanguageModel(model_config, 24, 3)
        shard(model, model_mesh(ranks, shard_ranks))
        model.to_empty(device="cpu")
        initialize(model, 0)
        optimizer = build_optimizer(model, optimizer_config)

        def step(seed, silent=None):
            generator = torch.Generator().manual_seed(seed)
            for name, p in model.named_parameters():
                gradient = torch.randn(p.shape, generator=generator)
                if silent is not None and "_proj" in name:
                    rows = len(gradient) // 3
                    gradient[silent * rows : (silent + 1) * rows] = 0
                p.grad = distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)
            optimizer.step()

        yield model, optimizer, step


def everything(model, optimizer):
    found = {}
    for name, p in model.named_parameters():
        found[name] = p
        found |= {f"{name}.{key}": value for key, value in optimizer.state[p].items()}
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().numpy().copy() for n, t in found.items()}


def after_steps(model_config, optimizer_config, shard_ranks=None, save=None, load=None):
    """All weights and states after three steps, the second of them without modality 1. `save` names a folder for a
    checkpoint after the second step; `load` one to take only the third step from."""
    from mom_train.checkpoint.saver import Checkpointer, TrainState
    from mom_train.checkpoint.store import Checkpoints
    from mom_train.config.run import CheckpointConfig

    with (
        a_model(model_config, optimizer_config, shard_ranks) as (model, optimizer, step),
        Checkpointer(Checkpoints(save or load or "/nowhere"), CheckpointConfig()) as checkpointer,
    ):
        if load is not None:
            checkpointer.load(checkpointer.newest(), model, optimizer, None)
        else:
            step(1)
            step(2, silent=1)
        if save is not None:
            checkpointer.save(model, optimizer, None, TrainState(step=2))
            checkpointer.wait()
        step(3)
        return everything(model, optimizer)
