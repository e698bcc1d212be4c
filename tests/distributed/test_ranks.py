"""How ranks share the work changes nothing: replicas of shards (HSDP), weights in host memory, gradients summed over
micro-batches before they travel."""

from itertools import islice

import numpy as np
import pytest

from tests.helpers.checkpoint_ranks import everything
from tests.helpers.ranks import run_ranks
from tests.helpers.run_config import tiny_config
from tests.helpers.steps import assert_same, smooth, train_steps


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(a folder, the result of one rank)."""
    folder = tmp_path_factory.mktemp("alone")
    [one] = run_ranks(1, train_steps, smooth(folder), 2)
    assert {"total", "in_proj", "embedding", "text", "image"} <= set(one["history"][0][1])
    assert all(norms["total"] > 0.05 for _, norms, _ in one["history"])  # so that clipping does something
    return folder, one


@pytest.mark.parametrize("shard_ranks", [2, 1, None])
def test_replicas_of_shards_train_as_one_rank_does(alone, shard_ranks):
    """2 x 2, four replicas, and four ranks that share one copy."""
    folder, one = alone
    for rank in run_ranks(4, train_steps, smooth(folder, parallel={"shard_ranks": shard_ranks}), 2):
        assert_same(rank, one)


@pytest.mark.parametrize(("world", "shard_ranks"), [(1, None), (4, 2)])
def test_weights_kept_in_host_memory_train_alike(alone, world, shard_ranks):
    folder, one = alone
    offloaded = smooth(folder, parallel={"cpu_offload": True, "shard_ranks": shard_ranks})
    assert_same(run_ranks(world, train_steps, offloaded, 2)[-1], one)


def refused(config):
    try:
        train_steps(config, 1)
    except ValueError as error:
        return str(error)
    return None


def test_a_number_of_ranks_that_replicas_do_not_fill_is_told_to_all(tmp_path):
    message = "parallel.shard_ranks=2 does not divide the 3 ranks"
    config = tiny_config(tmp_path, training__batch=3, parallel={"shard_ranks": 2})
    assert [message in str(told) for told in run_ranks(3, refused, config)] == [True] * 3


def collectives(config):
    """How often each collective ran in the forward and backward passes of one step, and the number of units."""
    from torch.distributed.fsdp import FSDPModule
    from torch.profiler import ProfilerActivity, profile

    from mom_train.distributed.ranks import process_group
    from mom_train.distributed.status import Stop
    from mom_train.trainer import Trainer

    with process_group() as ranks:
        trainer = Trainer(config, ranks)
        batches = list(islice(trainer.stream(), trainer.accumulation))
        agreement = trainer.agree(batches, Stop())
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            trainer.passes.forward_backward(batches, agreement.counts)
        counts = {event.key: event.count for event in seen.key_averages() if event.key.startswith("c10d::")}
        return counts, sum(isinstance(m, FSDPModule) for m in trainer.model.modules())


@pytest.mark.parametrize("shard_ranks", [None, 2])
def test_gradients_travel_once_a_step_whatever_is_accumulated(tmp_path, shard_ranks):
    world = 2 if shard_ranks is None else 4
    for micro_batches in (1, 4):
        config = tiny_config(tmp_path, training__batch=world * micro_batches, parallel={"shard_ranks": shard_ranks})
        for counts, units in run_ranks(world, collectives, config):
            assert counts.pop("c10d::_reduce_scatter_base_") == units == 5
            assert counts.pop("c10d::allreduce_", 0) == (0 if shard_ranks is None else units)
            # forward and backward, but for what is whole still in between: the last unit, and the root
            assert counts.pop("c10d::_allgather_base_") >= micro_batches * (2 * units - 2)
            assert not counts


def train_on(config):
    """Train from where the run stands to `training.stop_at`. Returns (the step it began from, the tensors there, the
    tensors at the end)."""
    from mom_train.distributed.ranks import process_group
    from mom_train.distributed.status import Stop
    from mom_train.trainer import Trainer

    with process_group() as ranks:
        trainer = Trainer(config, ranks)
        tensors = (trainer.model, trainer.optimizer, trainer.ema)
        step, before = trainer.state.step, everything(*tensors)
        assert trainer.run(Stop())[0] == "stopped"
        return step, before, everything(*tensors)


def test_a_checkpoint_of_shards_loads_into_replicas_and_back(tmp_path):
    saved = None
    for stop_at, (world, shard_ranks) in enumerate([(4, 2), (2, None), (4, 2), (1, None)], 1):
        config = tiny_config(
            tmp_path,
            parallel={"shard_ranks": shard_ranks},
            training__stop_at=stop_at,
            training__ema_decay=0.9,
            validation__sequences=1,
        )
        ranks = run_ranks(world, train_on, config)
        if saved is not None:
            for step, loaded, _ in ranks:
                assert step == stop_at - 1
                assert loaded.keys() == saved.keys()
                for name, value in loaded.items():
                    assert np.array_equal(value, saved[name]), name
        saved = ranks[0][2]
        assert any(name.endswith("exp_avg_sq") for name in saved)


def test_more_processes_than_gpus_are_refused_before_anything_waits(monkeypatch):
    import torch

    from mom_train.distributed.ranks import process_group

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"process 2 of this machine .* 2 can be seen here"), process_group():
        pass


def objects_and_host_tensors(config):
    """The devices that torch chooses for objects, in the default group and in those of a mesh, if NCCL is there too."""
    import torch
    import torch.distributed as dist
    import torch.distributed.distributed_c10d as c10d
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("cpu:gloo,cuda:gloo", rank=0, world_size=1, store=dist.HashStore())
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    groups = [dist.group.WORLD, mesh.get_group("replicate"), mesh.get_group("shard")]
    for group in groups:
        dist.all_reduce(torch.zeros(1), group=group)
    devices = [(c10d._get_object_coll_device(g), sorted(d.type for d in g._device_types)) for g in groups]
    dist.destroy_process_group()
    return devices


def test_a_group_with_a_backend_for_gpus_sends_objects_and_host_tensors_by_gloo(tmp_path):
    """Also in groups of meshes, which must inherit both backends. Gloo stands in for NCCL."""
    [devices] = run_ranks(1, objects_and_host_tensors, tiny_config(tmp_path))
    assert devices == [("cpu", ["cpu", "cuda"])] * 3
