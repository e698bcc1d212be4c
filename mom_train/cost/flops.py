"""Counts the FLOPs and parameters of a model from its config. FLOPs are those that the model needs, without
recomputation.

A decoupled projection counts once per token, whatever the number of modalities. Padding is not counted: callers
multiply by the number of real tokens. The scan counts 9 operations per channel and state (the convention of Mamba's
authors, state-spaces/mamba issue 110) and 2 per channel for the skip and the gate. Norms, softmax, RoPE and the other
activations are left out, as is usual.

Letters: d = dim, D = inner, N = state, R = rank, K = conv, h = feed_forward, L = sequence length, V = vocabulary,
p = patch width, M = modalities. A multiplication with an addition is two FLOPs.
"""

from __future__ import annotations

from mom_train.config.model import ModelConfig
from mom_train.config.run import RunConfig

# The backward pass costs twice as much as the forward pass. Recomputation is not counted.
TRAINING_FACTOR = 3
TIME_FREQUENCIES = 256
"""Number of sines and cosines that the MLP of the diffusion timestep reads."""


def forward_flops_per_token(
    config: ModelConfig, vocabulary: int, sequence_length: int | None = None, patch_width: int | None = None
) -> dict[str, int]:
    """FLOPs per token in the forward pass, for each part of the model.

    A Mamba block: in_proj 4dD, conv 2KD, x_proj 2D(R + 2N), dt_proj 2RD, scan 9DN + 2D, out_proj 2Dd.

    A Transformer block: q, k, v, o 8d^2, scores and values 2Ld, feed-forward 6dh. It needs `sequence_length`, because
    position t of a causal row attends to t positions, which is L / 2 on average, at 4d each. Rows with several
    documents need less, and the patches of a picture, which attend to each other in both directions, a little more.
    Neither is counted.

    A discrete token needs the head, 2dV. With `patch_width`, the token is a patch of a continuous picture and needs
    patch_in and patch_out, 2pd each, instead. The MLP of the timestep runs once per picture, 2(256d + d^2). With 256
    patches per picture, this is less than 0.003 % of a patch's FLOPs at every size here, and it is not counted.

    Raises ValueError for a transformer without a sequence length.
    """
    d, D, N, R, K = config.dim, config.inner, config.state, config.rank, config.conv
    if config.architecture == "transformer":
        if sequence_length is None:
            raise ValueError("the FLOPs of attention grow with the row: sequence_length is needed for a transformer")
        per_block = {
            "attention_proj": 8 * d * d,
            "attention": 2 * sequence_length * d,
            "feed_forward": 6 * d * config.feed_forward,
        }
    else:
        per_block = {
            "in_proj": 2 * d * 2 * D,
            "conv": 2 * K * D,
            "x_proj": 2 * D * (R + 2 * N),
            "dt_proj": 2 * R * D,
            "scan": 9 * D * N + 2 * D,
            "out_proj": 2 * D * d,
        }
    parts = {part: config.blocks * count for part, count in per_block.items()}
    if patch_width is None:
        return parts | {"head": 2 * d * vocabulary}
    return parts | {"patch_in": 2 * patch_width * d, "patch_out": 2 * d * patch_width}


def training_flops_per_token(
    config: ModelConfig, vocabulary: int, sequence_length: int | None = None, patch_width: int | None = None
) -> int:
    """FLOPs of one token in the forward and backward pass. Arguments and errors are as in `forward_flops_per_token`."""
    return TRAINING_FACTOR * sum(forward_flops_per_token(config, vocabulary, sequence_length, patch_width).values())


def training_flops(config: RunConfig, tokens: int, patches: int) -> int:
    """FLOPs of training on `tokens` discrete tokens and `patches` latent patches, in rows of the length in the
    config."""
    size, length, diffusion = config.layout.size, config.data.sequence_length, config.objective.diffusion
    each = training_flops_per_token(config.model, size, length)
    of_a_patch = training_flops_per_token(config.model, size, length, diffusion.patch_width if diffusion else 0)
    return each * tokens + of_a_patch * patches


def muon_matrices(config: RunConfig) -> list[tuple[int, int, int]]:
    """The matrices that Muon orthogonalises, as (rows, columns, number of them in the model). Empty with AdamW."""
    model, muon = config.model, config.optimizer.as_muon
    if muon is None:
        return []
    return [
        (rows, columns, model.blocks * model.copies(name, len(config.layout.modalities)))
        for name in muon.names(model)
        for columns, stacked in [model.matrices[name]]
        for rows in stacked
    ]


def muon_parameters(config: RunConfig) -> int:
    """Number of parameters that Muon trains, 0 with AdamW."""
    return sum(rows * columns * count for rows, columns, count in muon_matrices(config))


def newton_schulz_flops(rows: int, columns: int, iterations: int) -> int:
    """FLOPs of orthogonalising one matrix. With m the smaller and n the larger side, an iteration is XX^T, 2m^2 n, its
    square, 2m^3, and the product with X, 2m^2 n."""
    m, n = sorted((rows, columns))
    return iterations * (4 * m * m * n + 2 * m**3)


def optimizer_flops(config: RunConfig) -> int:
    """FLOPs of matrix products in a step of the optimiser: those of Muon, once in each copy of the model, 0 with AdamW.

    They are not part of the training FLOPs by which models are compared. They do not depend on the number of tokens.
    """
    muon = config.optimizer.as_muon
    iterations = 0 if muon is None else muon.iterations
    return sum(count * newton_schulz_flops(rows, columns, iterations) for rows, columns, count in muon_matrices(config))


def parameters(
    config: ModelConfig, vocabulary: int, modalities: int = 1, patch_width: int | None = None
) -> dict[str, int]:
    """Number of parameters of each part of the model, for all `modalities` together. Parts that it lacks are left out.

    `vocabulary` includes padding, as VocabLayout.size does. `patch_width` adds the diffusion adapters: patch_in (p +
    1)d, the MLP of the timestep 257d + (d + 1)d, and patch_out (d + 1)p. If dt_proj is decoupled, so is its bias; if
    `norm` is, so are the final norm and the norms of queries and keys (`qk_norm`, 2 heads' widths per block). The norms
    of `normalise` have no parameters. Learned routers are counted with their projection.
    """
    d, D, N, R, K, h = config.dim, config.inner, config.state, config.rank, config.conv, config.feed_forward

    routed = config.router == "learned" or config.experts > 1

    def copies(part: str) -> int:
        return modalities if part in config.decoupled else 1

    def matrices(part: str, *inputs_and_sizes: tuple[int, int]) -> int:
        """Number of parameters in the matrices of `part`, given the input width and size of each, and in their
        routers."""
        n = copies(part) * (config.experts if part in config.decoupled else 1)
        routers = sum(n * inputs for inputs, _ in inputs_and_sizes) if routed and part in config.decoupled else 0
        return n * sum(size for _, size in inputs_and_sizes) + routers

    per_block: dict[str, int]
    if config.architecture == "transformer":
        norms = (2 * config.blocks + 1) * d + (2 * config.blocks * config.head if config.qk_norm else 0)
        per_block = {
            "attention": matrices("attention", (d, 3 * d * d), (d, d * d)),
            "feed_forward": matrices("feed_forward", (d, 2 * d * h), (h, h * d)),
        }
    else:
        norms = (config.blocks + 1) * d
        projections = {
            "in_proj": (d, d * 2 * D),
            "x_proj": (D, D * (R + 2 * N)),
            "dt_proj": (R, R * D),
            "out_proj": (D, D * d),
        }
        per_block = {
            "projections": sum(matrices(part, sizes) for part, sizes in projections.items()) + copies("dt_proj") * D,
            "conv": (K + 1) * D,
            "ssm": (N + 1) * D,  # A_log and D
        }
    counts = {"embedding": vocabulary * d, "head": d * vocabulary}
    counts |= {part: config.blocks * count for part, count in per_block.items()}
    counts["norms"] = copies("norm") * norms
    if patch_width is not None:
        p = patch_width
        counts["adapters"] = (p + 1) * d + (TIME_FREQUENCIES + 1) * d + (d + 1) * d + (d + 1) * p
    return counts


def active_parameters(config: ModelConfig, vocabulary: int, patch_width: int | None = None) -> dict[str, int]:
    """Number of parameters that one token uses, with one modality and one expert: those of the dense model."""
    return parameters(config.model_copy(update={"experts": 1, "router": "rule"}), vocabulary, 1, patch_width)
