import pytest
import torch

from mom_train.config.model import PROJECTIONS, DiffusionConfig, ModelConfig
from mom_train.config.optimizer import OptimizerConfig, RateFactors
from mom_train.model.language_model import LanguageModel
from mom_train.optim.optimizer import build_optimizer, part_of, set_rate


def test_only_matrices_decay():
    model = LanguageModel(ModelConfig(dim=32, layers=1, decoupled=PROJECTIONS), 96, 3)
    decayed, kept = (group["params"] for group in build_optimizer(model, OptimizerConfig(learning_rate=1)).param_groups)
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(decayed) + len(kept) == len(names)
    assert {names[id(p)].split(".")[-1] for p in kept} == {"A_log", "D", "dt_bias", "conv_bias", "weight"}
    assert all("norm" in names[id(p)] for p in kept if names[id(p)].endswith("weight"))
    assert all(p.dim() == 2 and isinstance(p, torch.nn.Parameter) for p in decayed)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_each_parameter_gets_the_rate_of_its_kind(kind):
    wanted = {"embedding": 0.1, "head": 0.2, "norm": 0.3, "ssm": 0.4, "conv": 0.5, "projection": 0.6}
    leaves = {"A_log": "ssm", "D": "ssm", "dt_bias": "ssm", "conv_weight": "conv", "conv_bias": "conv"}
    model = LanguageModel(ModelConfig(dim=32, layers=1, decoupled=PROJECTIONS), 96, 3)
    plain = OptimizerConfig(kind=kind, learning_rate=1)
    optimizer = build_optimizer(model, plain.model_copy(update={"groups": RateFactors(**wanted)}))
    set_rate(optimizer, 2.0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    before = {id(p): g["weight_decay"] for g in build_optimizer(model, plain).param_groups for p in g["params"]}
    assert decay == before  # the groups change the rate alone
    for name, p in model.named_parameters():
        leaf = name.split(".")[-1]
        kind_of = leaves.get(leaf) or ("norm" if "norm" in name else name.split(".")[0])
        assert rate[id(p)] == 2.0 * wanted[kind_of if kind_of in wanted else "projection"], name


def test_every_part_of_a_model_of_pictures_is_of_a_kind():
    model = LanguageModel(
        ModelConfig(architecture="transformer", dim=32, heads=2, layers=1, decoupled=("norm",), qk_norm=True),
        96,
        3,
        diffusion=DiffusionConfig(patch_width=4),
    )
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    assert {part for name, part in parts.items() if name.startswith("patch_embedding")} == {"embedding"}
    assert {part for name, part in parts.items() if name.startswith("patch_head")} == {"head"}
    assert {part for name, part in parts.items() if name.startswith("blocks")} == {"norm", "projection"}
    assert all(("norm" in name) == (part == "norm") for name, part in parts.items())
    for kind in ("adamw", "muon"):  # no norm decays, and none goes to Muon
        optimizer = build_optimizer(model, OptimizerConfig(kind=kind, learning_rate=1))
        names = {id(p): n for n, p in model.named_parameters()}
        kept = {names[id(p)] for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
        assert "blocks.0.block.attention.q_norm.weight" in kept
        assert {name for name, part in parts.items() if part == "norm"} <= kept
