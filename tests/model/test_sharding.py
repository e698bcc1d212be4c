"""Gathering in bf16 against autocast over weights that are gathered in fp32, on real ranks."""

from itertools import islice

import pytest
import torch

from mom_train.config.model import PROJECTIONS, DiffusionConfig, ModelConfig
from mom_train.model.language_model import LanguageModel
from mom_train.model.sharding import gathered_in_bf16
from tests.helpers.ranks import run_ranks
from tests.helpers.run_config import tiny_config


def trained(config, steps):
    """For weights gathered in fp32 and in bf16: loss sums and norms of some steps, a checkpoint's weights, and moments
    of the optimiser."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    import mom_train.trainer as trainers
    from mom_train.distributed.ranks import process_group
    from mom_train.distributed.status import Stop
    from mom_train.model import sharding

    results = []
    with process_group() as ranks:
        for bf16 in (False, True):
            trainers.shard = lambda *given, bf16=bf16: sharding.shard(*given[:-1], bf16)
            trainer = trainers.Trainer(config, ranks)
            stream, seen = trainer.stream(), []
            for _ in range(steps):
                batches = list(islice(stream, trainer.accumulation))
                agreement = trainer.agree(batches, Stop())
                sums = trainer.passes.forward_backward(batches, agreement.counts)
                all_sums, norms = trainer.step(sums, agreement.counts, batches, detailed=True)
                trainer.advance(batches, agreement)
                seen.append((all_sums.tolist(), {name: norm.item() for name, norm in norms.items()}))
            weights, optimizer = get_state_dict(trainer.model, trainer.optimizer)
            moments = {n: (m["exp_avg"], m["exp_avg_sq"]) for n, m in optimizer["state"].items()}
            local = torch.utils._pytree.tree_map(lambda t: t.to_local().clone().numpy(), (weights, moments))
            results.append((seen, *local))
    return results


MIXTURE = {"dim": 32, "layers": 1, "decoupled": [*PROJECTIONS, "norm"]}


@pytest.mark.parametrize(
    ("model", "training", "parallel"),
    [
        (MIXTURE, {"activation_checkpointing": "selective", "batch": 4, "ema_decay": 0.9}, {}),
        (MIXTURE, {"activation_checkpointing": True}, {"context_ranks": 2}),
        ({**MIXTURE, "router": "learned"}, {}, {"cpu_offload": True}),
        ({"architecture": "transformer", "heads": 2, "dim": 32, "layers": 1, "decoupled": ["attention"]}, {}, {}),
    ],
    ids=["accumulation", "context", "router", "transformer"],
)
def test_losses_gradients_and_checkpoints_are_those_of_autocast_to_the_last_bit(tmp_path, model, training, parallel):
    training = {"steps": 8, "batch": 2, "micro_batch": 1, "precision": "bf16"} | training
    config = tiny_config(tmp_path, model=model, training=training, parallel=parallel)
    for autocast, half in run_ranks(2, trained, config, 3):
        assert half[0] == autocast[0]
        for ours, theirs in zip(half[1:], autocast[1:], strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours:
                for a, b in zip(*map(torch.utils._pytree.tree_leaves, (ours[name], theirs[name])), strict=True):
                    assert (a.dtype, a.shape) == (b.dtype, b.shape)
                    assert a.dtype == "float32"
                    assert (a == b).all(), name


def test_whatever_is_no_operand_of_a_matrix_product_stays_fp32():
    config = ModelConfig(dim=32, layers=1, decoupled=(*PROJECTIONS, "norm"), router="learned")
    with torch.device("meta"):
        model = LanguageModel(config, 64, 2, diffusion=DiffusionConfig(patch_width=4))
    half = gathered_in_bf16(model)
    fp32 = {name.split(".", 2)[-1] if name.startswith("blocks") else name
            for name, parameter in model.named_parameters() if parameter not in half}  # fmt: skip
    of_mixer = ["conv_weight", "conv_bias", "dt_bias", "A_log", "D", *(f"{part}.router" for part in PROJECTIONS)]
    assert fp32 == {"embedding.weight", "norm.weight", "block.norm.weight", *(f"block.mixer.{n}" for n in of_mixer)}
