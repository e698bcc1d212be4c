"""Predicted traffic against what real ranks really send, and the arithmetic around it."""

import json
import re

import pytest

from mom_tools.model import plan_run
from mom_tools.model.plan_run import describe
from mom_train.config.files import load_config
from mom_train.cost import step_time as p
from mom_train.cost.flops import forward_flops_per_token
from mom_train.cost.fp8 import saved_by_fp8
from tests.helpers import CHECKOUT
from tests.helpers.ranks import program, run_ranks
from tests.helpers.run_config import tiny_config

CONFIG = CHECKOUT / "configs" / "chameleon" / "443m-mom.yaml"
KINDS = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
    "c10d::alltoall_base_": "all_to_all",
    "_c10d_functional::all_reduce": "all_reduce",
}


def counted(config):
    """[(collective, bytes of the whole tensor)] of one training step, as this rank calls them."""
    from itertools import islice

    import torch
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode

    from mom_data.batches.loader import Share, batches
    from mom_train.distributed.ranks import process_group
    from mom_train.distributed.status import Stop
    from mom_train.trainer import Trainer
    from tests.helpers.corpus import VOCAB

    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(issubclass(t, DTensor) for t in types):
                return NotImplemented  # it comes again as the plain tensors that it is made of
            if function.namespace in ("c10d", "_c10d_functional") and function.name() in KINDS:
                tensors = [a for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, torch.Tensor)]
                calls.append((KINDS[function.name()], max(t.numel() * t.element_size() for t in tensors)))
            return function(*args, **(kwargs or {}))

    with process_group() as ranks:
        trainer = Trainer(config, ranks)
        share = Share(ranks.rank, ranks.world_size, config.training.batch, config.training.micro_batch)
        stream = batches(trainer.plan, VOCAB, share)
        for _ in range(2):  # the first step makes groups and buffers
            calls.clear()
            step = list(islice(stream, trainer.accumulation))
            with Count():
                agreement = trainer.agree(step, Stop())
                sums = trainer.passes.forward_backward(step, agreement.counts)
                trainer.step(sums, agreement.counts, step)
        return list(calls)


@pytest.mark.parametrize(
    ("ranks", "shard_ranks", "batch", "precision"),
    [(2, None, 2, "fp32"), (2, None, 6, "bf16"), (4, None, 4, "bf16"), (4, 2, 8, "fp32")],
    ids=["fsdp", "bf16-accumulation", "bf16-4", "hsdp-accumulation"],
)
def test_predicted_traffic_is_what_ranks_really_call_for(tmp_path, ranks, shard_ranks, batch, precision):
    training = {"steps": 8, "batch": batch, "micro_batch": 1, "precision": precision}
    objective = {"z_loss": 1e-4 if shard_ranks else 0}
    config = tiny_config(tmp_path, training=training, parallel={"shard_ranks": shard_ranks}, objective=objective)
    predicted = p.communication(config, ranks, p.units(config, p.shared_by(config, ranks)))
    for table in predicted.values():  # small agreements are all-reduces, too
        table["all_reduce"] += table.pop("small")
    for calls in run_ranks(ranks, counted, config):
        kinds = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
        assert {kind: sum(b for k, b in calls if k == kind) for kind in kinds} == predicted["payload"]
        assert {kind: sum(k == kind for k, _ in calls) for kind in kinds} == predicted["calls"]


def test_muon_sends_its_matrices_to_their_owners_and_back_and_agrees_on_those_without_a_gradient(tmp_path):
    config = tiny_config(tmp_path, training__batch=2, optimizer={"learning_rate": 0.01, "kind": "muon"})
    predicted = p.communication(config, 2, p.units(config, 2))
    found = run_ranks(2, counted, config)
    for calls in found:
        small = sum(b for k, b in calls if k == "all_reduce")
        assert small == predicted["payload"]["small"]
        assert sum(k == "all_reduce" for k, _ in calls) == predicted["calls"]["small"]
        assert sum(k == "all_to_all" for k, _ in calls) == predicted["calls"]["all_to_all"] == 2
    # of each call the larger of what a rank sends and receives, where one is its shards and the other what it owns
    sent = sum(b for calls in found for k, b in calls if k == "all_to_all") / 2
    assert predicted["payload"]["all_to_all"] <= sent < 1.1 * predicted["payload"]["all_to_all"]


def test_a_ring_sends_each_byte_that_others_lack(tmp_path):
    config = tiny_config(tmp_path, training__batch=8)
    every = [p.Unit("a", 1000, 1), p.Unit("root", 24, 1)]
    two, four = (p.communication(config, ranks, every) for ranks in (2, 4))
    # gathered twice and the root once, in fp32; of it half is on the rank itself, or a quarter
    assert two["payload"]["all_gather"] == 4 * 4 * (2000 + 24)
    assert two["sent"]["all_gather"] == two["payload"]["all_gather"] / 2
    assert four["payload"]["all_gather"] == 2 * 4 * (2000 + 24)
    assert four["sent"]["reduce_scatter"] == 4 * 1024 * 3 / 4
    alone = p.communication(config, 1, every)
    assert not any(alone["payload"].values())
    assert not any(alone["calls"].values())


def given(network, **changes):
    assumed = p.Assumptions(mfu=0.5, efficiency=1.0, latency=0.0, patch_share=0.5, price=2.0)
    return p.Cluster(p.Gpu(1e12, 80e9, 1e30, 1e30), changes.get("nodes", 4), 2, network, assumed)


def test_communication_hides_behind_computing_and_shows_where_it_takes_longer():
    config = load_config(CONFIG, ["training.batch=8", "training.micro_batch=1"])
    every = p.units(config, 8)
    fast, slow = (p.step_time(config, given(network), every) for network in (1e30, 1.0))
    assert fast["exposed"] == pytest.approx(0, abs=1e-9)
    # half the peak while it computes: twice the seconds at peak
    assert fast["computing"] == pytest.approx(2 * fast["at_peak"])
    tokens = config.data.sequence_length
    flops = 3 * sum(forward_flops_per_token(config.model, config.layout.size, tokens).values())
    assert fast["at_peak"] == pytest.approx(flops * tokens / 1e12)
    # a byte per second: all of it shows, but for what one unit's computing hides
    assert slow["computing"] == fast["computing"]
    payload = p.communication(config, 8, every)["sent"]
    assert slow["communicating"] == pytest.approx(payload["all_gather"] + payload["reduce_scatter"], rel=1e-3)
    assert slow["communicating"] - slow["computing"] <= slow["exposed"] <= slow["communicating"]


def test_sharding_inside_a_node_leaves_the_network_the_gradients_alone():
    config = load_config(CONFIG, ["training.batch=8", "training.micro_batch=1", "parallel.shard_ranks=2"])
    seconds = p.step_time(config, given(1.0), p.units(config, 2))
    sent = p.communication(config, 8, p.units(config, 2))["sent"]
    # both ranks of a node send their half of the sums through its one network
    assert seconds["communicating"] == pytest.approx(2 * sent["all_reduce"], rel=1e-3)


def test_the_command_prints_what_a_run_takes_and_says_that_it_is_predicted(tmp_path):
    command = ["tools/plan_run.py", CONFIG, "--nodes", 2, "--price", 3]
    out = tmp_path / "plan.json"
    networks = ["infiniband-ndr", "ethernet-100g"]
    program(*command, "--interconnect", *networks, "--json", out).check_returncode()
    plans = json.loads(out.read_text())
    assert [plan["interconnect"] for plan in plans] == networks
    config = load_config(CONFIG, [])
    for plan in plans:
        tokens = config.training.steps * config.training.batch * config.data.sequence_length
        assert plan["tokens"] == tokens
        assert plan["hours"] * 3600 == pytest.approx(plan["seconds_per_step"]["total"] * config.training.steps)
        assert plan["tokens_per_gpu_hour"] * plan["gpu_hours"] == pytest.approx(tokens)
        assert plan["cost"] == pytest.approx(3 * plan["gpu_hours"])
    assert plans[0]["tokens_per_s"] > plans[1]["tokens_per_s"]
    assert plans[0]["mfu"] < 0.35
    said = describe("a run", plans)
    assert "PREDICTED" in said
    assert f"{plans[1]['gpu_hours']:,.0f}" in said
    wrong = program(*command, "training.batch=7")
    assert wrong.returncode == 2
    assert "multiple" in wrong.stderr


def test_fp8_gains_what_its_share_of_the_products_and_the_bytes_of_rounding_say():
    """The dense 1.5B step as it was measured on an H100: 16,384 tokens in 462 ms, of which products took 181."""
    overrides = ["training.precision=fp8", "training.micro_batch=4", "training.activation_checkpointing=selective"]
    config = load_config(CHECKOUT / "configs/chameleon/1.5b-mamba.yaml", overrides)
    saved, blocks = saved_by_fp8(config, 989e12, 3.35e12), config.model.blocks
    d, D, T, V = config.model.dim, config.model.inner, 4 * config.data.sequence_length, config.layout.size
    assert (T, V % 16) == (16_384, 0)
    # in_proj (d, 2D) and out_proj (D, d) in two of three products each, and the logits
    gained = T * (blocks * 2 * (2 * d * 2 * D + 2 * D * d) + 2 * d * V) / (0.77 * 989e12) / 2
    elements = blocks * (T * (d + D + 2 * D + d) + 2 * (2 * d * D + D * d)) + T * d + V * d
    rounding = 3 * elements / (0.9 * 3.35e12)
    total = blocks * (saved.block_forward + saved.block_backward) + saved.head_forward
    assert total == pytest.approx(gained - rounding, rel=1e-9)
    assert 0.462 / (0.462 - total) == pytest.approx(1.10, abs=0.015)
    mixture = load_config(CHECKOUT / "configs/chameleon/1.5b-mom.yaml", overrides)
    more = saved_by_fp8(mixture, 989e12, 3.35e12)
    assert 0 < more.block_forward < saved.block_forward, "the weights of every modality are rounded"


def test_a_plan_in_fp8_says_that_its_gain_is_calculated(capsys, monkeypatch):
    config = str(CHECKOUT / "configs/chameleon/1.5b-mamba.yaml")
    said = {}
    for precision in ("bf16", "fp8"):
        monkeypatch.setattr("sys.argv", ["plan", config, f"training.precision={precision}", "--nodes", "1"])
        plan_run.main()
        said[precision] = capsys.readouterr().out
    assert "calculated, not measured" in said["fp8"]
    assert "calculated, not measured" not in said["bf16"]
    seconds = {k: float(re.search(r"computing +\| +([\d.]+)", text)[1]) for k, text in said.items()}
    gain = float(re.search(r"not measured\) *\| *([\d.]+)", said["fp8"])[1])
    assert seconds["bf16"] / seconds["fp8"] == pytest.approx(gain, abs=0.01)
    assert gain > 1.02
