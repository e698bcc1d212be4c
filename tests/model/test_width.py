"""Width transfer: what model.base_dim makes of each parameter, and that activations change alike at every width."""

import math

import pytest
import torch

from mom_train.config.model import PROJECTIONS, DiffusionConfig, ModelConfig
from mom_train.config.muon import MuonConfig
from mom_train.config.optimizer import OptimizerConfig
from mom_train.config.width import attention_scale, growth
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel
from mom_train.ops.layout import RowLayout
from mom_train.optim.optimizer import build_optimizer, set_rate

V, M = 64, 3
KINDS = {
    "dense": {"decoupled": ()},
    "mixture": {"decoupled": PROJECTIONS},
    "transformer": {"architecture": "transformer", "decoupled": (), "heads": 2},
}


def model_of(kind, dim, base=None, seed=0, **changes):
    config = ModelConfig(dim=dim, layers=1, base_dim=base, **{**KINDS[kind], **changes})
    model = LanguageModel(config, V, M)
    initialize(model, seed)
    return model


def batch(seed, rows=4, length=24):
    tokens_BL = torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))
    document_BL = torch.zeros(rows, length, dtype=torch.int32)
    layout = RowLayout.sort((tokens_BL % M).to(torch.uint8), document_BL, M)
    tokens_T = tokens_BL.reshape(-1)[layout.rows]
    return tokens_T, layout, (tokens_T * 7 + 3) % V


def train(model, config, steps):
    optimizer = build_optimizer(model, config)
    for step in range(steps):
        tokens_T, layout, labels_T = batch(100 + step)
        (model(tokens_T, layout, labels_T).tokens / len(tokens_T)).backward()
        set_rate(optimizer, config.learning_rate)
        optimizer.step()
        optimizer.zero_grad()


# ---- the coordinate check (arXiv 2203.03466, appendix D) ----------------------------------------------------------


def activations(model):
    """Name -> values of a kind of activation in all blocks, for one fixed batch. `learned` is how far the logits of the
    right ids are above the mean of all."""
    found, hooks, config = {}, [], model.config

    def note(module, **parts):
        def hook(_, given, out):
            for name, part in parts.items():
                found.setdefault(name, []).append(part(given, out).detach().float().flatten())

        hooks.append(module.register_forward_hook(hook))

    for block in model.blocks:
        note(block, residual=lambda _, out: out)
        if config.architecture == "mamba":
            mixer, R, N = block.block.mixer, config.rank, config.state
            note(mixer.in_proj, x=lambda _, out: out[:, : config.inner], z=lambda _, out: out[:, config.inner :])
            note(
                mixer.x_proj,
                low_dt=lambda _, out, R=R: out[:, :R],
                B=lambda _, out, R=R, N=N: out[:, R : R + N],
                C=lambda _, out, R=R, N=N: out[:, R + N :],
            )
            note(mixer.dt_proj, dt=lambda _, out: out)
            note(mixer.out_proj, y=lambda given, _: given[0], branch=lambda _, out: out)
        else:
            note(block.block.attention.qkv_proj, v=lambda _, out: out[:, 2 * config.dim :])
            note(block.block.attention.out_proj, attention=lambda _, out: out)
            note(block.block.feed_forward.down_proj, hidden=lambda given, _: given[0], branch=lambda _, out: out)
    tokens_T, layout, labels_T = batch(7)
    with torch.no_grad():
        logits_TV, _ = model(tokens_T, layout)
    for hook in hooks:
        hook.remove()
    learned_T = logits_TV.gather(1, labels_T.long()[:, None])[:, 0] - logits_TV.mean(1)
    return {name: torch.cat(parts) for name, parts in found.items()}, learned_T.mean().item()


WIDTHS = (32, 64, 128, 256)


def slopes(kind, base, seeds):
    """For each kind of activation, the exponent of the width in the mean size of its change over five steps of AdamW,
    by least squares over four widths, on logarithms. The mean is over seeds."""
    changes = {}
    for width in WIDTHS:
        sizes = {}
        for seed in seeds:
            model = model_of(kind, width, base, seed)
            before, untrained = activations(model)
            train(model, OptimizerConfig(learning_rate=0.01), 5)
            after, learned = activations(model)
            for name, values in after.items():
                sizes.setdefault(name, []).append((values - before[name]).abs().mean().item())
            sizes.setdefault("learned", []).append(learned - untrained)
        for name, values in sizes.items():
            changes.setdefault(name, []).append(math.log(sum(values)))
    x = [math.log(width) for width in WIDTHS]
    mean = sum(x) / len(x)
    over = sum((a - mean) ** 2 for a in x)
    return {name: sum((a - mean) * b for a, b in zip(x, y, strict=True)) / over for name, y in changes.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_activations_change_as_much_at_every_width_with_base_dim_and_not_without(kind):
    with_base, without = slopes(kind, WIDTHS[0], (0, 1)), slopes(kind, None, (0,))
    assert max(map(abs, with_base.values())) < 0.25, with_base
    assert min(without["residual"], without["branch"], without["learned"]) > 0.4, without


# ---- each parameter, by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        # from width 32 to 128: four times the width, the inner width and the rank
        (
            "mixture",
            {"experts": 2},
            {
                "embedding.weight": (1, 1),
                "norm.weight": (1, 1),
                "blocks.0.block.norm.weight": (1, 1),
                "blocks.0.block.mixer.in_proj.weight": (1, 1 / 4),
                "router": (1 / 4, 1 / 4),
                "blocks.0.block.mixer.conv_weight": (1, 1),
                "blocks.0.block.mixer.conv_bias": (1, 1),
                "blocks.0.block.mixer.x_proj.weight": ((1, 1 / 2, 1 / 2), 1 / 4),
                "blocks.0.block.mixer.dt_proj.weight": (1, 1 / 4),
                "blocks.0.block.mixer.dt_bias": (1, 1),
                "blocks.0.block.mixer.A_log": (1, 1),
                "blocks.0.block.mixer.D": (1, 1),
                "blocks.0.block.mixer.out_proj.weight": (1, 1 / 4),
                "head.weight": (1 / 2, 1 / 4),
                "patch_embedding.patch_in.weight": (1, 1),
                "patch_embedding.patch_in.bias": (1, 1),
                "patch_embedding.time_in.weight": (1, 1),
                "patch_embedding.time_in.bias": (1, 1),
                "patch_embedding.time_out.bias": (1, 1),
                "patch_embedding.time_out.weight": (1, 1 / 4),
                "patch_head.patch_out.weight": (1 / 2, 1 / 4),
                "patch_head.patch_out.bias": (1, 1),
            },
        ),
        # a rank that stays: its rows are a fixed number, and dt_proj has a fixed fan-in
        (
            "dense",
            {"dt_rank": 4},
            {
                "blocks.0.block.mixer.x_proj.weight": ((1 / 2, 1 / 2, 1 / 2), 1 / 4),
                "blocks.0.block.mixer.dt_proj.weight": (1, 1),
            },
        ),
        # the feed-forward is 8/3 of the width, rounded up to 256: 256 at width 32, 512 at 128
        (
            "transformer",
            {},
            {
                "blocks.0.block.attention.qkv_proj.weight": (1, 1 / 4),
                "blocks.0.block.attention.out_proj.weight": (1, 1 / 4),
                "blocks.0.block.feed_forward.gate_up_proj.weight": (1, 1 / 4),
                "blocks.0.block.feed_forward.down_proj.weight": (1, 1 / 2),
            },
        ),
    ],
)
def test_initial_values_and_rates_of_each_parameter_follow_its_fan_in(kind, changes, expected):
    diffusion = DiffusionConfig(patch_width=4)
    models = []
    for base in (32, None):
        config = ModelConfig(dim=128, layers=1, base_dim=base, **{**KINDS[kind], **changes})
        models.append(LanguageModel(config, V, M, diffusion=diffusion))
        initialize(models[-1], 0)
    scaled, plain = models
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, eps=1e-8)
    group = {id(p): g for g in build_optimizer(scaled, config).param_groups for p in g["params"]}
    usual = {id(p): g for g in build_optimizer(plain, config).param_groups for p in g["params"]}
    there = dict(plain.named_parameters())
    for name, p in scaled.named_parameters():
        kind_of = name.replace("blocks.1.", "blocks.0.")
        if name.endswith("router"):
            kind_of = "router"
        if kind_of not in expected:
            assert kind != "mixture", f"nothing is expected of {name}"
            continue
        initial, rate = expected[kind_of]
        if isinstance(initial, tuple):  # dt, B and C of every matrix
            rank, state, copies = scaled.config.rank, scaled.config.state, len(p) // (scaled.config.rank + 32)
            of_rows = [initial[0]] * rank + [initial[1]] * state + [initial[2]] * state
            initial = torch.tensor(of_rows * copies)[:, None]
        torch.testing.assert_close(p, there[name] * initial, rtol=1e-6, atol=0)
        of, before = group[id(p)], usual[id(there[name])]
        assert of["factor"] == pytest.approx(rate)
        assert of["factor"] * of["weight_decay"] == pytest.approx(before["weight_decay"])  # the rate times the decay
        to_fixed_rows = name.endswith("router") or name in ("head.weight", "patch_head.patch_out.weight")
        rank_stays = changes.get("dt_rank") and "x_proj" in name
        assert of["eps"] == pytest.approx(1e-8 if to_fixed_rows or rank_stays else 1e-8 / 4), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_width_itself_as_base_changes_no_bit(kind):
    for optimizer in ("adamw", "muon"):
        weights = []
        for base in (None, 32):
            model = model_of(kind, 32, base)
            config = OptimizerConfig(learning_rate=0.01, kind=optimizer)
            train(model, config, 2)
            weights.append(dict(model.named_parameters()))
        assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())


def test_muon_takes_the_factor_of_the_base_and_goes_on_by_the_shape():
    """match_rms_adamw alone would grow as the root of the width, where a hidden matrix needs no growth."""
    config = OptimizerConfig(learning_rate=1, kind="muon", muon=MuonConfig(precision="fp32"))
    factors = {}
    for width in (32, 128):
        optimizer = build_optimizer(model_of("dense", width, 32), config)
        matrices = optimizer._owners.matrices[:7]  # those of the first block: x, z; dt, B, C; dt_proj; out_proj
        assert [m.rows for m in matrices] == [2 * width, 2 * width, width // 16, 16, 16, 2 * width, width]
        factors[width] = optimizer._factor[:7]
    assert factors[32].tolist() == pytest.approx([0.2 * math.sqrt(64)] * 7)
    assert (factors[128] / factors[32]).tolist() == pytest.approx([1, 1, 1, 1 / 2, 1 / 2, 1, 1])


def test_attention_scores_are_divided_by_the_width_of_a_head_where_heads_grow_wider():
    def of(dim, heads, **more):
        config = ModelConfig(architecture="transformer", dim=dim, layers=1, decoupled=(), heads=heads, **more)
        return attention_scale(config)

    assert of(64, 4) is None
    assert of(64, 4, base_dim=64) is None
    assert of(256, 4, base_dim=64) == pytest.approx(4 / 64)  # sqrt(16) / 64
    assert of(256, 16, base_dim=64, base_heads=4) is None  # more heads of the same width
    assert attention_scale(ModelConfig(dim=64, layers=1, decoupled=(), base_dim=32)) is None
    tokens_T, layout, _ = batch(0)
    model = model_of("transformer", 64, 32)
    with torch.no_grad():
        logits_TV = model(tokens_T, layout)[0]
        plain = model_of("transformer", 64)
        plain.load_state_dict(model.state_dict())
        for block in plain.blocks:  # the same factor, put into the queries
            block.block.attention.qkv_proj.weight[:64] *= (16 / 32) ** 0.5
        torch.testing.assert_close(plain(tokens_T, layout)[0], logits_TV, rtol=1e-4, atol=1e-5)


def test_a_base_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="base_heads: it belongs to base_dim"):
        model_of("transformer", 64, base_heads=2)
    with pytest.raises(ValueError, match=r"base_dim / heads must be an even number \(30 / 4\); set base_heads"):
        model_of("transformer", 64, 30, heads=4)
    with pytest.raises(ValueError, match="base_heads: only a transformer has it"):
        model_of("dense", 64, 32, base_heads=2)
    assert growth("head.weight", ModelConfig(dim=64, layers=1, decoupled=())).rate == 1


def test_an_exported_transformer_keeps_its_attention_scale():
    from mom_train.exchange.transformers_model import MixtureOfMambaConfig, MixtureOfMambaForCausalLM

    model = model_of("transformer", 64, 32)
    vocabulary = [["text", V - 6 - 4], ["image", 2], ["speech", 2]]
    config = MixtureOfMambaConfig(model=model.config.model_dump(mode="json"), vocabulary=vocabulary, vocab_size=V)
    theirs = MixtureOfMambaForCausalLM(config)
    theirs.model.load_state_dict(model.state_dict())
    tokens_T, layout, _ = batch(0, rows=1)
    tokens_BL = tokens_T[layout.order.long()].view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens_BL).logits[0], model(tokens_T, layout)[0][layout.order.long()])
