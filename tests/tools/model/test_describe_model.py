"""tools/describe_model.py as a process, and its memory formulas against what autograd keeps and training allocates."""

import json
import subprocess
import sys
from contextlib import nullcontext
from itertools import accumulate, islice
from unittest.mock import patch

import pytest
import torch

from mom_tools.model.describe_model import by_part, describe, overview
from mom_train.config.files import load_config
from mom_train.config.model import PROJECTIONS, ModelConfig
from mom_train.cost.flops import parameters
from mom_train.cost.memory import block_activation_bytes, memory
from mom_train.model.attention import attention_mask
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel
from mom_train.ops import native
from mom_train.ops.layout import RowLayout
from tests.helpers import CHECKOUT
from tests.helpers.corpus import write_dataset
from tests.helpers.ranks import program, run_ranks
from tests.helpers.run_config import tiny_config

CONFIGS = CHECKOUT / "configs"


def tool(*arguments, cwd=CHECKOUT):
    return program(CHECKOUT / "tools/describe_model.py", *arguments, cwd=cwd)


def test_the_json_contract(tmp_path):
    path = CONFIGS / "chameleon_speech/443m-mom.yaml"
    shown = tool(path, "--json")
    assert shown.returncode == 0, shown.stderr
    described = json.loads(shown.stdout)
    counts, flops = described["parameters"], described["flops_per_token"]
    assert counts["total"] / 1e6 == pytest.approx(1089.9, rel=0.005)
    assert counts["active"] / 1e6 == pytest.approx(454.2, rel=0.005)
    assert sum(counts["by_part"].values()) == counts["total"]
    assert set(counts["by_part"]) == {"embedding", "head", "projections", "conv", "ssm", "norms"}
    assert flops["training"] == 3 * flops["forward"] == 3 * sum(flops["by_part"].values())
    assert flops["forward"] / 1e6 == pytest.approx(648 + 134, rel=0.02)  # 2 x 0.32 G block weights and scan; the head
    assert isinstance(described["memory_bytes_per_rank"], int)
    assert described["ranks"] == 64  # Table 6

    out = tmp_path / "out.json"
    assert tool(path, "--json", out).stdout == ""
    assert json.loads(out.read_text()) == described
    both = json.loads(tool(path, CONFIGS / "transfusion/163m-mot.yaml", "--json").stdout)
    assert both[0] == described
    patch = both[1]["flops_per_token"]["patch"]
    assert patch["forward"] == sum(patch["by_part"].values()) < both[1]["flops_per_token"]["forward"]
    assert {"attention", "feed_forward", "adapters"} <= set(both[1]["parameters"]["by_part"])


def test_width_transfer_is_shown_by_kind_of_parameter():
    path = CONFIGS / "chameleon_speech/443m-mom.yaml"  # width 1024
    assert describe(load_config(path))["width_transfer"] is None
    described = describe(load_config(path, ["model.base_dim=256"]))
    assert described["base_dim"] == 256
    kinds = described["width_transfer"]["kinds"]
    assert kinds["in_proj"] == {"initial": [1, 1], "rate": 0.25, "weight_decay": 4, "eps": 0.25}
    assert kinds["x_proj"]["initial"] == [1, 0.5, 0.5]
    assert kinds["head"] == {"initial": [0.5], "rate": 0.25, "weight_decay": 4, "eps": 1}
    assert "width 1024, tuned at 256" in by_part("a", described)
    muon = describe(load_config(path, ["model.base_dim=256", "optimizer.kind=muon"]))["width_transfer"]["kinds"]
    assert muon["x_proj"] == {"initial": [1, 0.5, 0.5], "muon": [1, 0.5, 0.5]}
    assert muon["head"] == kinds["head"]


def test_the_shift_of_the_noise_schedule_is_that_of_the_shards_pictures(tmp_path):
    write_dataset(tmp_path / "d", documents=8, shards=1, latent_width=8)  # pictures of 16 patches
    given = ["vocabulary={text: 128, image: 1}", "objective.diffusion={patch_width: 8}", "data.validation={}"]

    def described(path, *more):
        overrides = [*given, f"data.train=[{{path: {path}}}]", "run_dir=r", "tokenizers=null", "validation.every=null"]
        return describe(load_config(CONFIGS / "demo_transfusion.yaml", [*overrides, *more]))

    [picture] = described(tmp_path / "d")["noise_schedule"]["pictures"]
    assert (picture["patches"], picture["values"], picture["alpha"]) == (16, 128, 1.0)
    assert picture["alpha_for_4096"] == pytest.approx((128 / 4096) ** 0.5)
    shifted = described(tmp_path / "d", "objective.diffusion.shift_base=32")
    assert shifted["noise_schedule"]["pictures"][0]["alpha"] == pytest.approx(2.0)
    assert "pictures of 16 patches, 128 values: shifted by alpha = 2" in by_part("c", shifted)
    assert described(tmp_path / "d", "objective.diffusion.shift=3")["noise_schedule"]["pictures"][0]["alpha"] == 3.0
    away = by_part("c", described(tmp_path / "gone", "objective.diffusion.shift_base=32"))
    assert "alpha = sqrt(values / 32), and the shards are not here" in away
    assert "noise_schedule" not in describe(load_config(CONFIGS / "chameleon/37m-mom.yaml"))


def test_overrides_and_ranks_count():
    path = CONFIGS / "chameleon/37m-mom.yaml"
    plain, deeper = (json.loads(tool(path, *more, "--json").stdout) for more in ((), ("model.layers=8", "--ranks", 8)))
    blocks = ("projections", "conv", "ssm")
    assert all(deeper["parameters"]["by_part"][b] == 2 * plain["parameters"]["by_part"][b] for b in blocks)
    assert (deeper["ranks"], deeper["accumulation"]) == (8, 8)
    weights = deeper["memory"]["without_checkpointing"]["by_use"]["parameters"]
    assert weights == deeper["parameters"]["total"] * 4 / 8


def test_a_ramp_of_the_batch_is_shown_beside_the_whole_batch():
    ramp = "training.batch_ramp=[{batch: 32, until: 100}, {batch: 64, until: 2000}]"
    d = describe(load_config(CONFIGS / "chameleon/37m-mom.yaml", [ramp, "training.batch=128"]))
    assert d["batch_ramp"] == [
        {"until": 100, "tokens_per_batch": 32 * 4096},
        {"until": 2000, "tokens_per_batch": 64 * 4096},
    ]
    assert "tokens a batch: 131,072 until step 100; 262,144 until step 2,000; then 524,288" in by_part("37m", d)


def test_one_config_is_shown_part_by_part_and_several_a_row_each():
    one = tool("configs/transfusion/760m-mom.yaml").stdout
    assert "| adapters" in one
    assert "| MFLOPs per latent patch" in one
    several = tool("configs/chameleon/94m-mamba.yaml", "configs/chameleon/94m-transformer.yaml").stdout.splitlines()
    assert len(several) == 4
    assert [cell.strip() for cell in several[2].split("|")[1:4]] == ["configs/chameleon/94m-mamba.yaml", "94.2", "94.2"]
    assert len({line.count("|") for line in several}) == 1
    long = tool("configs/chameleon/94m-mamba.yaml", "configs/chameleon/94m-mot.yaml", "--by-part").stdout
    assert "| ssm" in long
    assert "| feed_forward" in long


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/none.yaml"], "no config file configs/none.yaml"),
        (["configs/chameleon/37m-mom.yaml", "model.layer=3"], "did you mean 'layers'"),
        (["configs/transfusion/163m-mom.yaml", "--ranks", "56"], "training.batch (256) must be a multiple"),
        (["configs/chameleon/37m-mom.yaml", "--ranks", "0"], "--ranks 0: at least 1"),
        (["model.layers=3"], "no CONFIG"),
        (["--json", "a.yaml", "configs/chameleon/37m-mom.yaml"], "would overwrite a config"),
        (["configs/chameleon/_37m.yaml"], "run_dir: missing"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, message):
    done = tool(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_it_neither_builds_a_model_nor_waits_for_torch():
    code = (
        "import sys\n"
        "from mom_tools.model.describe_model import describe, load_config\n"
        "describe(load_config('configs/chameleon/1.5b-mom.yaml'))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True)


MAMBA = ModelConfig(dim=128, layers=1, decoupled=PROJECTIONS)
TRANSFORMER = ModelConfig(
    architecture="transformer", heads=4, dim=128, layers=1, decoupled=("attention", "feed_forward")
)


@pytest.mark.parametrize("config", [MAMBA, TRANSFORMER], ids=lambda c: c.architecture)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_block_keeps_as_many_bytes_per_token_as_predicted(config, precision):
    """What autograd really saves in one block's forward pass, storage by storage, apart from weights, their bf16
    copies, and what all blocks share (layout, mask, RoPE's angles)."""
    if config is MAMBA and native.library(16) is None:
        pytest.skip("NO C COMPILER: the prediction is for the C scan's chunks")
    B, L, modalities = 2, 480, 2
    model = LanguageModel(config, 64, modalities)
    initialize(model, 0)
    modality = torch.randint(0, modalities, (B, L), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    layout = RowLayout.sort(modality, torch.zeros(B, L, dtype=torch.int32), modalities)
    more = (attention_mask(layout),) if config is TRANSFORMER else ()
    saved, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t):
        saved[t.untyped_storage().data_ptr()] = t
        return t

    x_Td = torch.randn(B * L, config.dim, requires_grad=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.blocks[0](x_Td, layout, None, *more)
    ours = {tuple(p.shape) for p in model.blocks.parameters()}
    copies = {*ours, *(shape[::-1] for shape in ours)}  # of the weights, in bf16, perhaps transposed
    shared = {(B, 1, L, L), (L, config.dim // (config.heads or 1) // 2)}
    per_token = sum(
        t.untyped_storage().nbytes()
        for pointer, t in saved.items()
        if pointer not in weights and t.is_floating_point() and tuple(t.shape) not in copies | shared
    ) / (B * L)
    element = 2 if precision == "bf16" else 4
    assert per_token == pytest.approx(block_activation_bytes(config, element), rel=0.02)


def peak_of_training(config):
    """The most bytes that PyTorch's allocator held while two steps were trained, counted from the start."""
    from torch.profiler import ProfilerActivity, profile

    from mom_train.distributed.ranks import process_group
    from mom_train.distributed.status import Stop
    from mom_train.trainer import Trainer

    with process_group() as ranks, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer = Trainer(config, ranks)
        stream = trainer.stream()
        for _ in range(2):
            batches = list(islice(stream, trainer.accumulation))
            agreement = trainer.agree(batches, Stop())
            sums = trainer.passes.forward_backward(batches, agreement.counts)
            trainer.step(sums, agreement.counts, batches, detailed=True)
            trainer.advance(batches, agreement)
    events = (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(accumulate(bytes_ for _, bytes_ in sorted((e.start_ns(), e.nbytes()) for e in events)))


def peak_of_training_for_graphs(config):
    """The same with the passes that `training.cuda_graph` records, which a CPU runs each time."""
    with patch("mom_train.trainer.check_device"):
        return peak_of_training(config)


MIXTURE = {"dim": 256, "layers": 3, "decoupled": list(PROJECTIONS)}
WIDE = {"dim": 512, "layers": 2, "decoupled": list(PROJECTIONS)}
ATTENTION = {"architecture": "transformer", "heads": 4, "dim": 256, "layers": 3, "decoupled": ["feed_forward"]}
SMALL = {"text": 964, "image": 1000, "speech": 28}
LARGE = {"text": 7964, "image": 8192, "speech": 28}


@pytest.mark.parametrize(
    ("world", "vocabulary", "model", "length", "training", "peak_at"),
    [
        (1, LARGE, MIXTURE, 512, {}, "head_forward"),
        (1, SMALL, MIXTURE, 1024, {"activation_checkpointing": True}, "first_block_backward"),
        (1, SMALL, WIDE, 1024, {"activation_checkpointing": "selective"}, "last_block_backward"),
        (1, SMALL, ATTENTION, 512, {"batch": 2, "micro_batch": 2}, "last_block_backward"),
        # bf16, and so narrow: a processor without instructions for it would take a minute for dim 512
        (2, SMALL, MIXTURE, 192, {"batch": 4, "precision": "bf16", "ema_decay": 0.9}, "last_block_backward"),
        (2, SMALL, WIDE, 256, {"batch": 2, "activation_checkpointing": True}, "first_block_backward"),
    ],
    ids=["head", "checkpointing", "selective", "transformer", "accumulation", "units"],
)
def test_training_needs_as_much_memory_as_predicted(tmp_path, world, vocabulary, model, length, training, peak_at):
    if native.library(16) is None:
        pytest.skip("NO C COMPILER: the prediction is for the C scan's chunks")
    config = tiny_config(
        tmp_path,
        vocabulary=vocabulary,
        model=model,
        data__sequence_length=length,
        training={"steps": 8, "batch": 1, "micro_batch": 1} | training,
    )
    predicted = memory(config, world, "cpu")
    predicted = predicted[predicted["chosen"]]
    measured = run_ranks(world, peak_of_training, config)[0]
    print(f"predicted / measured = {predicted['total'] / measured:.3f}, highest in {predicted['peak_at']}")
    assert predicted["total"] == pytest.approx(measured, rel=0.1)
    # the moments that are told apart matter: this one is at least nearly the highest
    assert predicted["moments"][peak_at] > 0.93 * predicted["total"]


@pytest.mark.parametrize(
    "training",
    [{"activation_checkpointing": True, "batch": 2}, {"precision": "bf16", "batch": 2}],
    ids=["fp32", "bf16"],
)
def test_passes_for_graphs_need_as_much_memory_as_predicted(tmp_path, training):
    if native.library(16) is None:
        pytest.skip("NO C COMPILER: the prediction is for the C scan's chunks")
    config = tiny_config(
        tmp_path,
        vocabulary=SMALL,
        model={"dim": 128, "layers": 2, "decoupled": list(PROJECTIONS)},
        data__sequence_length=192,
        training={"steps": 8, "batch": 1, "micro_batch": 1, "cuda_graph": True} | training,
    )
    predicted = memory(config, 1, "cpu")
    predicted = predicted[predicted["chosen"]]
    measured = run_ranks(1, peak_of_training_for_graphs, config)[0]
    print(f"predicted / measured = {predicted['total'] / measured:.3f}, highest in {predicted['peak_at']}")
    assert predicted["total"] == pytest.approx(measured, rel=0.06)
    assert (
        predicted["peak_at"] == "head_forward"
    )  # so that copies, gradients and activations are all in what was measured


def test_on_a_gpu_the_update_comes_on_top_of_the_memory_that_graphs_keep():
    path, changes = CONFIGS / "chameleon/37m-mom.yaml", ["training.micro_batch=8", "training.batch=8"]
    plain, graph = (
        memory(load_config(path, [*changes, f"training.cuda_graph={on}"]), 1)["without_checkpointing"]
        for on in ("false", "true")
    )
    passes = max(bytes_ for moment, bytes_ in graph["moments"].items() if moment != "update")
    counts = parameters(load_config(path).model, 65_536, 2)
    largest = 65_536 * 256  # weights of the head, whose squares of the gradient are the largest workspace of the update
    assert graph["peak_at"] == "update"
    assert graph["total"] == passes + 16 * largest
    assert graph["by_use"]["units"] == 2 * (counts["projections"] + largest)  # copies in bf16, also between steps
    assert plain["moments"]["update"] < passes


def test_memory_sums_what_it_says_and_checkpointing_keeps_one_blocks_activations():
    """1.5B with three modalities on 128 ranks, one sequence each, by hand."""
    config = load_config(CONFIGS / "chameleon_speech/1.5b-mom.yaml")
    counts = parameters(config.model, 65_536, 3)
    predicted = memory(config, 128)
    plain, recomputing = predicted["without_checkpointing"], predicted["with_checkpointing"]
    uses = plain["by_use"]
    assert plain["peak_at"] == recomputing["peak_at"] == "head_forward"
    assert uses["parameters"] + uses["optimizer"] == pytest.approx(12 * 4067.2e6 / 128, rel=0.005)
    # in bf16 the head's weight and the buffer it was gathered in, and in fp32 what blocks have beside projections
    assert uses["units"] == 4 * 65_536 * 2048 + 4 * sum(counts[part] for part in ("conv", "ssm", "norms"))
    block = block_activation_bytes(config.model, 2, "cuda")
    assert uses["activations"] - recomputing["by_use"]["activations"] == 4096 * 48 * (block - 4 * 2048)
    for kind in (plain, recomputing):
        assert kind["total"] == sum(kind["by_use"].values()) == max(kind["moments"].values())
    assert describe(config)["memory_bytes_per_rank"] == plain["total"]
    checkpointed = load_config(CONFIGS / "chameleon_speech/1.5b-mom.yaml", ["training.activation_checkpointing=true"])
    assert describe(checkpointed)["memory_bytes_per_rank"] == recomputing["total"]


def test_how_the_ranks_share_the_model_shows_in_its_memory():
    path, ranks = CONFIGS / "chameleon/880m-mom.yaml", 64

    def of(*overrides):
        return memory(load_config(path, overrides), ranks)["with_checkpointing"]

    n = sum(parameters(load_config(path).model, 65_536, 2).values())
    all_share, nodes = of(), of("parallel.shard_ranks=8")
    assert nodes["by_use"]["parameters"] == 4 * n // 8 == pytest.approx(8 * all_share["by_use"]["parameters"], abs=8)
    offloaded = of("parallel.cpu_offload=true")
    assert offloaded["by_use"]["parameters"] == offloaded["by_use"]["optimizer"] == 0
    assert offloaded["host"] == 16 * n // 64
    accumulating = of("training.micro_batch=1")  # two a step: gradients are whole in between
    assert accumulating["by_use"]["gradients"] > 0.7 * 4 * n
    with pytest.raises(ValueError, match="shard_ranks=24 does not divide the 64 ranks"):
        of("parallel.shard_ranks=24")


def test_the_tables_of_the_docs_are_what_the_tool_prints_today():
    page = (CHECKOUT / "docs/reference/models.md").read_text()
    shown = {line for line in page.splitlines() if line.startswith("| configs/")}
    presets = (p for p in sorted(CONFIGS.glob("*/[!_]*.yaml")) if p.parent.name != "mini")
    paths = [p.relative_to(CHECKOUT) for p in presets]
    printed = set()
    for setting in {p.parent for p in paths}:
        rows = {str(p): describe(load_config(CHECKOUT / p)) for p in paths if p.parent == setting}
        printed |= set(overview(rows).splitlines()[2:])
    assert len(printed) == 74
    assert shown == printed
