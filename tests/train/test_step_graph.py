"""Passes over a micro-batch as `training.cuda_graph` runs them: the same losses, gradients and checkpoints as without.

On a CPU nothing can be recorded, so there the same passes run in the same tensors each time; the test on a GPU records
them."""

from itertools import islice

import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mom_tokenizers.errors import UserError
from mom_train import trainer
from mom_train.config.model import PROJECTIONS
from mom_train.distributed.ranks import Ranks, process_group
from mom_train.distributed.status import Stop
from mom_train.model import step_graph
from mom_train.trainer import Trainer
from tests.helpers.run_config import tiny_config

TRANSFORMER = {"architecture": "transformer", "heads": 2, "dim": 32, "layers": 1, "decoupled": []}
MIXTURE = {"dim": 32, "layers": 1, "decoupled": [*PROJECTIONS, "norm"]}


def steps_of(run, number):
    """Loss sums and norms of some steps, and all weights after them."""
    stream, seen = run.stream(), []
    for _ in range(number):
        batches = list(islice(stream, run.accumulation))
        agreement = run.agree(batches, Stop())
        sums = run.passes.forward_backward(batches, agreement.counts)
        all_sums, norms = run.step(sums, agreement.counts, batches, detailed=True)
        run.advance(batches, agreement)
        seen.append((all_sums.tolist(), {name: float(norm) for name, norm in norms.items()}))
    weights = {
        n: (p.to_local() if hasattr(p, "to_local") else p).detach().clone() for n, p in run.model.named_parameters()
    }
    return seen, weights


@pytest.mark.parametrize(
    ("model", "training"),
    [
        (MIXTURE, {"precision": "bf16", "activation_checkpointing": "selective"}),
        ({**MIXTURE, "router": "learned"}, {"precision": "bf16", "micro_batch": 4, "ema_decay": 0.9}),
        (MIXTURE, {"precision": "fp32"}),
    ],
    ids=["bf16, four micro-batches", "bf16, router, one micro-batch", "fp32"],
)
def test_steps_are_those_of_fsdp_to_the_last_bit(tmp_path, monkeypatch, model, training):
    training = {"steps": 8, "batch": 4, "micro_batch": 1, **training}
    objective = {"z_loss": 1e-2 if training["precision"] == "fp32" else 0}
    monkeypatch.setattr(trainer, "check_device", lambda ranks: None)
    results = []
    with process_group() as ranks:
        for graph in (False, True):
            changes = {"model": model, "objective": objective, "training": {**training, "cuda_graph": graph}}
            config = tiny_config(tmp_path, **changes)
            run = Trainer(config.model_copy(update={"run_dir": tmp_path / f"run{graph}"}), ranks)
            results.append(steps_of(run, 3))
    (seen, weights), (other_seen, other_weights) = results
    assert seen == other_seen
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, other_weights[name]), name


class _OnlyOn(TorchDispatchMode):
    """Fails where an operator reads or makes a tensor on another device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.operators = device, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            assert not isinstance(value, torch.Tensor) or value.device.type == self.device, f"{function} on the host"
        self.operators += 1
        return result


def meta_graph(tmp_path, model):
    """The passes of a mixture on the meta device, whose tensors have no values, and a batch for them."""
    from mom_train.model.language_model import build_model
    from mom_train.model.objective import Counts
    from mom_train.passes import Passes

    config = tiny_config(tmp_path, model=model, training={"steps": 8, "batch": 2, "micro_batch": 1, "cuda_graph": True})
    passes = Passes(config, config.layout, Ranks(0, 1, torch.device("meta"), None), build_model(config))
    batch = passes._full_batch()
    return passes._graph, batch, (Counts(passes.targets(batch), 0, batch.tokens.numel()), config.objective)


@pytest.mark.parametrize("model", [MIXTURE, {**MIXTURE, "decoupled": []}, {**MIXTURE, "router": "learned"}])
def test_what_is_recorded_reads_no_value_from_the_device_and_nothing_from_the_host(tmp_path, monkeypatch, model):
    """Both would be errors in a recording, or would be recorded with the values of the first batch."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # asked about meta, it raises
    graph, batch, rest = meta_graph(tmp_path, model)
    graph(batch, *rest, first=True)  # makes the tensors
    for first in (True, False):
        with _OnlyOn("meta") as seen:
            graph._passes(first)
        assert seen.operators > 100
    with pytest.raises(AssertionError, match="on the host"), _OnlyOn("meta"):  # so that the test above can fail
        torch.zeros(1) + 1


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model": TRANSFORMER}, "model.architecture"),
        ({"parallel": {"cpu_offload": True}}, "parallel.cpu_offload"),
        ({"parallel": {"context_ranks": 2}}, "parallel.context_ranks"),
        ({"observe": {"statistics_every": 2}}, "observe.statistics_every"),
        ({"objective": {"diffusion": {"patch_width": 4}}}, "objective.diffusion"),
    ],
)
def test_what_cannot_be_recorded_is_one_message(tmp_path, changes, names):
    training = {"steps": 8, "batch": 2, "micro_batch": 1}
    tiny_config(tmp_path, training=training, **changes)
    with pytest.raises(
        ValidationError, match=rf"training\.cuda_graph does not go together with {names}.*: .*leave one"
    ):
        tiny_config(tmp_path, training={**training, "cuda_graph": True}, **changes)


def test_a_run_without_a_gpu_or_on_several_ranks_is_refused():
    with pytest.raises(UserError, match=r"cuda_graph needs an NVIDIA GPU, and this run is on cpu; leave it out"):
        step_graph.check_device(Ranks(0, 1, torch.device("cpu"), None))
    with pytest.raises(UserError, match=r"cuda_graph runs on one rank, and here are 2: .*leave it out"):
        step_graph.check_device(Ranks(0, 2, torch.device("cuda"), None))


def test_a_checkpoint_is_continued_without_and_with_graphs_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "check_device", lambda ranks: None)
    ends = []
    with process_group() as ranks:
        config = tiny_config(
            tmp_path, model=MIXTURE, training={"steps": 8, "batch": 2, "micro_batch": 1, "cuda_graph": True}
        )
        run = Trainer(config, ranks)
        steps_of(run, 2)
        run.save()
        run.checkpointer.wait()
        for graph in (True, False):
            training = config.training.model_copy(update={"cuda_graph": graph})
            ends.append(steps_of(Trainer(config.model_copy(update={"training": training}), ranks), 1))
    (seen, weights), (other_seen, other_weights) = ends
    assert seen == other_seen
    assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())


@pytest.mark.gpu
def test_recorded_passes_give_the_bits_of_passes_that_are_not(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("NO CUDA DEVICE: the recording of CUDA graphs is not tested on this machine")
    from mom_tools.bench.gpu_graph import Case, compared

    assert not compared(torch.device("cuda"), Case("mixture", 64, 1, 2, 256, 3)).different
