"""tools/describe_model.py as a process, and its memory formulas against what autograd keeps."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mom_train.attention import attention_mask
from mom_train.config import PROJECTIONS, ModelConfig, load_config
from mom_train.flops import parameters
from mom_train.kernels import native
from mom_train.layout import RowLayout
from mom_train.model import LanguageModel, initialize

CHECKOUT = Path(__file__).parents[2]
sys.path.insert(0, str(CHECKOUT / "tools"))
from describe_model import block_activation_bytes, describe, memory  # noqa: E402

CONFIGS = CHECKOUT / "configs"


def tool(*arguments, cwd=CHECKOUT):
    command = [sys.executable, CHECKOUT / "tools/describe_model.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


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


def test_overrides_and_ranks_count():
    path = CONFIGS / "chameleon/37m-mom.yaml"
    plain, deeper = (json.loads(tool(path, *more, "--json").stdout) for more in ((), ("model.layers=8", "--ranks", 8)))
    blocks = ("projections", "conv", "ssm")
    assert all(deeper["parameters"]["by_part"][b] == 2 * plain["parameters"]["by_part"][b] for b in blocks)
    assert (deeper["ranks"], deeper["accumulation"]) == (8, 8)
    states = deeper["memory"]["without_checkpointing"]["states"]
    assert states == deeper["parameters"]["total"] * 16 / 8


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
        (["configs/chameleon/37m-mom.yaml", "--ranks", "0"], "at least one rank"),
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
    code = "import sys; sys.path.insert(0, 'tools'); import describe_model as d; from mom_train.config import load_config\n"
    code += "d.describe(load_config('configs/chameleon/1.5b-mom.yaml')); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True)


MAMBA = ModelConfig(dim=128, layers=1, decoupled=PROJECTIONS)
TRANSFORMER = ModelConfig(
    architecture="transformer", heads=4, dim=128, layers=1, decoupled=("attention", "feed_forward")
)


@pytest.mark.parametrize("config", [MAMBA, TRANSFORMER], ids=lambda c: c.architecture)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_block_keeps_as_many_bytes_per_token_as_predicted(config, precision):
    """What autograd really saves in one block's forward pass, by storage: weights, their bf16 copies and what is one
    for the whole batch (layout, mask, RoPE table) apart."""
    if config is MAMBA and native.library(16) is None:
        pytest.skip("NO C COMPILER: the prediction is for the C scan's chunks")
    B, L, modalities = 2, 512, 2
    model = LanguageModel(config, 64, modalities)
    initialize(model, 0)
    modality = torch.randint(0, modalities, (B, L), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    layout = RowLayout.sort(modality, torch.zeros(B, L, dtype=torch.int32), modalities)
    more = (attention_mask(layout),) if config is TRANSFORMER else ()
    element = 4
    saved, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t):
        if t.untyped_storage().data_ptr() not in weights:
            saved[t.untyped_storage().data_ptr()] = t
        return t

    autocast = nullcontext()
    if precision == "bf16":
        element, autocast = 2, torch.autocast("cpu", torch.bfloat16)
    x_Td = torch.randn(B * L, config.dim, requires_grad=True)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.blocks[0](x_Td, layout, None, *more)
    shared = {(B, 1, L, L)}  # the mask, the same in every block
    shapes = {tuple(p.shape) for p in model.blocks.parameters()}
    weight_like = [
        t for t in saved.values() if t.dim() == 2 and t.shape[0] < B * L and tuple(t.t().shape) in shapes | {*shapes}
    ]
    assert weight_like is not None
    per_token = [
        t.untyped_storage().nbytes()
        for t in saved.values()
        if t.is_floating_point() and tuple(t.shape) not in shared and t.untyped_storage().nbytes() % (B * L) == 0
    ]
    assert sum(per_token) / (B * L) == pytest.approx(block_activation_bytes(config, element), rel=0.05)
