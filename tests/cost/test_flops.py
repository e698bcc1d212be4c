"""mom_train/cost/flops.py against the paper's sizes, the built model, and PyTorch's own counter."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mom_tokenizers.vocab import VocabLayout
from mom_train.config.files import load_config
from mom_train.config.model import PROJECTIONS, DiffusionConfig, ModelConfig, Part
from mom_train.cost.flops import forward_flops_per_token, parameters, training_flops_per_token
from mom_train.model.language_model import LanguageModel
from tests.helpers import CHECKOUT

CONFIGS = CHECKOUT / "configs"
MOT: tuple[Part, ...] = ("attention", "feed_forward", "norm")
# scale: dim, layers, heads, vocabulary, patch width, millions of parameters: dense Mamba, Transformer, MoM with 2 and 3
# modalities
SCALES = {
    "37m": (256, 4, 8, 65_536, None, 37.1, 37.0, 40.5, 43.9),
    "94m": (512, 8, 8, 65_536, None, 94.2, 94.4, 121.0, 147.7),
    "443m": (1024, 24, 16, 65_536, None, 454.2, 442.5, 772.1, 1089.9),
    "880m": (1536, 24, 24, 65_536, None, 917.3, 880.9, 1630.0, 2342.6),
    "1.5b": (2048, 24, 16, 65_536, None, 1537.6, 1501.7, 2802.4, 4067.2),
    "163m": (768, 16, 12, 32_000, 32, 170.7, 163.3, None, None),
    "760m": (1536, 24, 24, 32_000, 32, 817.1, 780.7, None, None),
    "1.4b": (2048, 24, 16, 32_000, 32, 1405.1, 1369.2, None, None),
}
# Table 6 and Table 5: tokens per batch, steps, sequences per GPU
PAPER_RUNS = {
    "37m": (524_288, 160_000, 2),
    "94m": (524_288, 160_000, 2),
    "443m": (524_288, 160_000, 2),
    "880m": (524_288, 120_000, 2),
    "1.5b": (524_288, 120_000, 1),
    "163m": (1_048_576, 250_000, 4),
    "760m": (1_048_576, 250_000, 4),
    "1.4b": (1_048_576, 250_000, 2),
}
PARTS = {"mamba": (), "mom": PROJECTIONS, "transformer": (), "mot": MOT}
RUNS = [
    (setting, scale, architecture)
    for setting, scales in (
        ("chameleon", ("37m", "94m", "443m", "880m", "1.5b")),
        ("chameleon_speech", ("37m", "94m", "443m", "880m", "1.5b")),
        ("transfusion", ("163m", "760m", "1.4b")),
    )
    for scale in scales
    for architecture in PARTS
]


def read(path):
    """(config, its vocabulary, its diffusion section's patch width)"""
    config = load_config(path)
    diffusion = config.objective.diffusion
    return config, VocabLayout(config.vocabulary), diffusion and diffusion.patch_width


def built(config, vocabulary, modalities, diffusion=None):
    with torch.device("meta"):
        return LanguageModel(config, vocabulary, modalities, diffusion=diffusion)


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("setting", "scale", "architecture"), RUNS)
def test_a_paper_config_has_the_papers_shape_size_and_batch(setting, scale, architecture):
    config, vocab, patch_width = read(CONFIGS / setting / f"{scale}-{architecture}.yaml")
    dim, layers, heads, vocabulary, width, mamba, transformer, two, three = SCALES[scale]
    attends = architecture in ("transformer", "mot")
    assert config.model.architecture == ("transformer" if attends else "mamba")
    assert (config.model.dim, config.model.layers, config.model.heads) == (dim, layers, heads if attends else None)
    assert config.model.decoupled == PARTS[architecture]
    assert (vocab.size, vocab.used, patch_width) == (vocabulary, vocabulary, width)
    assert vocab.modalities == (("text", "image", "speech") if setting == "chameleon_speech" else ("text", "image"))
    assert config.run_dir == Path("runs") / setting / f"{scale}-{architecture}"

    dense = transformer if attends else mamba
    active = sum(parameters(config.model, vocab.size, 1, patch_width).values())
    total = sum(parameters(config.model, vocab.size, len(vocab.modalities), patch_width).values())
    assert active / 1e6 == pytest.approx(dense, rel=0.005)
    if architecture in ("mamba", "transformer"):
        assert total == active
    elif architecture == "mom" and (expected := three if setting == "chameleon_speech" else two):
        assert total / 1e6 == pytest.approx(expected, rel=0.005)
    twin = {"mom": "mamba", "mot": "transformer"}.get(architecture, architecture)
    twin_config, *_ = read(CONFIGS / setting / f"{scale}-{twin}.yaml")
    assert active == sum(parameters(twin_config.model, vocab.size, len(vocab.modalities), patch_width).values())

    tokens, steps, micro_batch = PAPER_RUNS[scale]
    assert config.data.sequence_length == 4096
    assert config.training.batch * config.data.sequence_length == tokens
    assert (config.training.steps, config.training.micro_batch) == (steps, micro_batch)
    assert config.optimizer.warmup < steps


@pytest.mark.parametrize("path", [f"{s}/{c}-{a}.yaml" for s, c, a in RUNS if c in ("37m", "443m", "163m", "1.4b")])
def test_the_formula_counts_what_the_model_has_part_by_part(path):
    config, vocab, patch_width = read(CONFIGS / path)
    counts = parameters(config.model, vocab.size, len(vocab.modalities), patch_width)
    model = built(config.model, vocab.size, len(vocab.modalities), config.objective.diffusion)
    assert sum(counts.values()) == size(model)
    assert counts["embedding"] == size(model.embedding)
    assert counts["head"] == size(model.head)
    if patch_width:
        assert counts["adapters"] == size(model.patch_embedding) + size(model.patch_head)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert counts["norms"] == norms


@pytest.mark.parametrize("decoupled", [c for n in range(6) for c in combinations((*PROJECTIONS, "norm"), n)])
def test_every_subset_of_parts_is_counted_as_built(decoupled):
    config = ModelConfig(dim=48, layers=2, decoupled=decoupled, expand=3, state=8, dt_rank=5, normalise=True)
    assert sum(parameters(config, 128, 3).values()) == size(built(config, 128, 3))


@pytest.mark.parametrize("decoupled", [c for n in range(4) for c in combinations(MOT, n)])
def test_every_subset_of_a_transformers_parts_is_counted_as_built(decoupled):
    diffusion = DiffusionConfig.model_validate({"patch_width": 12})
    for qk_norm in (False, True):
        kind = {"architecture": "transformer", "heads": 2, "qk_norm": qk_norm}
        config = ModelConfig(**kind, dim=48, layers=3, decoupled=decoupled)
        assert sum(parameters(config, 128, 3, 12).values()) == size(built(config, 128, 3, diffusion))


def test_the_ablation_is_the_sixteen_subsets_and_nothing_else_differs():
    """Table 3. At 443M: dim 1024, inner 2048, rank 64, state 16; 48 blocks, and two modalities more."""
    each = {
        "in": 48 * 2 * (1024 * 2 * 2048),
        "x": 48 * 2 * (2048 * (64 + 2 * 16)),
        "dt": 48 * 2 * (64 * 2048 + 2048),
        "out": 48 * 2 * (2048 * 1024),
    }
    subsets = [c for n in range(5) for c in combinations(each, n)]
    names = {"443m-" + ("-".join(c) or "none") + ".yaml": c for c in subsets}
    assert sorted(p.name for p in (CONFIGS / "ablation").iterdir()) == sorted(names)
    baseline, vocab, _ = read(CONFIGS / "ablation/443m-none.yaml")
    assert baseline.model == load_config(CONFIGS / "chameleon_speech/443m-mamba.yaml").model
    assert vocab.modalities == ("text", "image", "speech")
    dense = sum(parameters(baseline.model, vocab.size, 3).values())
    for name, parts in names.items():
        config, *_ = read(CONFIGS / "ablation" / name)
        assert config.model.decoupled == tuple(f"{part}_proj" for part in parts)
        assert sum(parameters(config.model, vocab.size, 3).values()) == dense + sum(each[part] for part in parts)
        assert config.run_dir.name == name.removesuffix(".yaml")
        same = config.model.model_copy(update={"decoupled": ()})
        assert config.model_copy(update={"model": same, "run_dir": baseline.run_dir}) == baseline


class PlainTransformer(nn.Module):
    """A Transformer written from the definition. Each position attends to itself and to those before it, one position
    at a time, so that nothing that is masked is computed or counted."""

    def __init__(self, d, h, layers, vocabulary):
        super().__init__()
        linear = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
        self.layers = nn.ModuleList(
            nn.ModuleList([*(linear(d, d) for _ in range(4)), linear(d, h), linear(d, h), linear(h, d)])
            for _ in range(layers)
        )
        self.head = linear(d, vocabulary)

    def forward(self, x_Ld):
        for layer in self.layers:
            q, k, v, o, w1, w3, w2 = layer.children()
            queries, keys, values = q(x_Ld), k(x_Ld), v(x_Ld)
            rows = [(queries[t : t + 1] @ keys[: t + 1].T).softmax(-1) @ values[: t + 1] for t in range(x_Ld.shape[0])]
            x_Ld = x_Ld + o(torch.cat(rows))
            x_Ld = x_Ld + w2(nn.functional.silu(w1(x_Ld)) * w3(x_Ld))
        return self.head(x_Ld)


def test_a_transformers_flops_are_what_pytorch_counts_forward_and_backward():
    L, d, V, layers = 256, 64, 96, 2
    config = ModelConfig(architecture="transformer", heads=4, dim=d, layers=layers, decoupled=MOT)
    plain = PlainTransformer(d, config.feed_forward, layers, V)
    parts = forward_flops_per_token(config, V, L)
    x = torch.randn(L, d, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = plain(x)
    assert counter.get_total_flops() / L == pytest.approx(sum(parts.values()), rel=0.01)
    assert parts["attention"] > 0.05 * sum(parts.values())  # else the comparison would not see it
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert 3 * sum(parts.values()) == training_flops_per_token(config, V, L)
    assert counter.get_total_flops() / L == pytest.approx(2 * sum(parts.values()), rel=0.01)


def test_a_patchs_flops_are_its_two_linear_maps_in_the_heads_place():
    config = ModelConfig(dim=64, layers=2, decoupled=PROJECTIONS)
    token, patch = forward_flops_per_token(config, 96), forward_flops_per_token(config, 96, patch_width=12)
    with FlopCounterMode(display=False) as counter:
        nn.Linear(64, 12)(nn.Linear(12, 64)(torch.randn(10, 12)))
    assert patch["patch_in"] + patch["patch_out"] == counter.get_total_flops() // 10
    assert sum(token.values()) - token["head"] == sum(patch.values()) - patch["patch_in"] - patch["patch_out"]
    assert "head" not in patch


def test_a_routed_projection_counts_once_and_a_transformer_needs_the_rows_length():
    config = ModelConfig(dim=64, layers=2, decoupled=PROJECTIONS)
    assert forward_flops_per_token(config, 96) == forward_flops_per_token(
        config.model_copy(update={"decoupled": ()}), 96
    )
    transformer = ModelConfig(architecture="transformer", heads=4, dim=64, layers=2, decoupled=())
    with pytest.raises(ValueError, match="sequence_length"):
        training_flops_per_token(transformer, 96)
