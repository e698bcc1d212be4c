"""What a config's model costs before anything is built: parameters, FLOPs per token, memory per rank.

    python tools/describe_model.py configs/chameleon/1.5b-mom.yaml
    python tools/describe_model.py configs/transfusion/760m-mom.yaml training.micro_batch=2 --ranks 64 --json
    python tools/describe_model.py configs/chameleon/[!_]*.yaml           # one row for each

Everything is a formula (mom_train/flops.py, and `memory` here): no weight is made. Memory is predicted, not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mom_data.errors import exit_clearly
from mom_train.config import ModelConfig, RunConfig, load_config
from mom_train.flops import TRAINING_FACTOR, active_parameters, forward_flops_per_token, parameters

_FP32 = 4
_STATE_BYTES = 16  # per parameter: fp32 weight, gradient and AdamW's two moments
_SCAN_CHUNK = 32  # the scan keeps one state per so many positions (the C backend's; longer chunks keep less)


def block_activation_bytes(config: ModelConfig, element: int) -> int:
    """Bytes per token that one block keeps for its backward pass; `element` is the bytes of a matmul's operands.

    Mamba: 8d for the norm (the fp32 residual and its normalised form; a fused CUDA norm keeps the first alone),
    element x (d + 5D + R + 2N) for in_proj's input and output, conv, x_proj, dt_proj and the scan's output, and
    4DN / chunk for the scan's states. Transformer: 16d for two norms, element x (9d + 4h) for q, k and v before and
    after RoPE, attention's output in both orders, the inputs, and SwiGLU's four; 4 bytes a head for the softmax.
    """
    d, D, N, R = config.dim, config.inner, config.state, config.rank
    if config.architecture == "transformer":
        assert config.heads is not None
        return 16 * d + element * (9 * d + 4 * config.feed_forward) + _FP32 * config.heads
    return 8 * d + element * (d + 5 * D + R + 2 * N) + _FP32 * D * N // _SCAN_CHUNK


def memory(config: RunConfig, counts: Mapping[str, int], ranks: int) -> dict[str, Any]:
    """Predicted bytes on each of `ranks` ranks under FSDP2, by what they are for; `counts` as flops.parameters.

    states          16 bytes x parameters / ranks: all that is sharded
    largest_unit    weight and gradient (fp32, and its bf16 copy) of the largest unit while it is whole
    weight_casts    bf16 copies of the linear maps, which autograd keeps from forward to backward, unsharded; with
                    activation checkpointing those of one block
    activations     tokens of a micro-batch x what is kept for each: every block's activations; with checkpointing
                    every block's fp32 input and one block's activations. The final norm and head keep 8d + 2 x
                    element x d in both
    Not included: the allocator's fragmentation, NCCL's buffers, the head's chunk of logits, a prefetched next unit.
    """
    model = config.model
    blocks = model.blocks
    mixed = config.training.precision == "bf16"
    element, cast = (2, 2) if mixed else (4, 0)
    linear = sum(counts.get(part, 0) for part in ("projections", "attention", "feed_forward"))
    whole_block = (sum(counts.values()) - counts["embedding"] - counts["head"] - counts.get("adapters", 0)) // blocks
    unit = max(counts["head"], whole_block, counts.get("adapters", 0))
    states = -(-_STATE_BYTES * sum(counts.values()) // ranks)
    tokens = config.training.micro_batch * config.data.sequence_length
    kept = block_activation_bytes(model, element)
    ends = 8 * model.dim + 2 * element * model.dim

    def sums(weight_casts: int, per_token: int) -> dict[str, int]:
        parts = {
            "states": states,
            "largest_unit": (2 * _FP32 + cast) * unit,
            "weight_casts": weight_casts,
            "activations": per_token * tokens,
        }
        return parts | {"total": sum(parts.values()), "activations_per_token": per_token}

    return {
        "without_checkpointing": sums(cast * linear, blocks * kept + ends),
        "with_checkpointing": sums(cast * linear // blocks, (blocks * _FP32) * model.dim + kept + ends),
        "activation_checkpointing": config.training.activation_checkpointing,
    }


def describe(config: RunConfig, ranks: int | None = None) -> dict[str, Any]:
    """All figures of one config. `ranks` is by default the number that needs no accumulation, as in the paper.

    Raises ValueError for a number of ranks that the batch cannot be dealt to.
    """
    if ranks is None:
        ranks = max(1, config.training.batch // config.training.micro_batch)
    if ranks < 1:
        raise ValueError(f"--ranks {ranks}: at least one rank")
    accumulation = config.accumulation(ranks)
    model, length = config.model, config.data.sequence_length
    vocab = config.layout
    patch_width = config.objective.diffusion.patch_width if config.objective.diffusion else None
    total = parameters(model, vocab.size, len(vocab.modalities), patch_width)
    active = active_parameters(model, vocab.size, patch_width)

    def flops(patch_width: int | None) -> dict[str, Any]:
        parts = forward_flops_per_token(model, vocab.size, length, patch_width)
        forward = sum(parts.values())
        return {"forward": forward, "training": TRAINING_FACTOR * forward, "by_part": parts}

    bytes_by_use = memory(config, total, ranks)
    chosen = "with_checkpointing" if config.training.activation_checkpointing else "without_checkpointing"
    return {
        "architecture": model.architecture,
        "decoupled": list(model.decoupled),
        "dim": model.dim,
        "layers": model.layers,
        "blocks": model.blocks,
        "vocabulary": vocab.size,
        "modalities": list(vocab.modalities),
        "parameters": {
            "total": sum(total.values()),
            "active": sum(active.values()),
            "by_part": total,
            "active_by_part": active,
        },
        # of a discrete token; a latent patch has patch_in and patch_out in the head's place
        "flops_per_token": flops(None) | ({} if patch_width is None else {"patch": flops(patch_width)}),
        "tokens_per_batch": config.training.batch * length,
        "ranks": ranks,
        "accumulation": accumulation,
        "memory_bytes_per_rank": bytes_by_use[chosen]["total"],
        "memory": bytes_by_use,
    }


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, readable as it stands: the first column to the left, figures to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def _millions(n: float) -> str:
    return f"{n / 1e6:,.1f}"


def _gigabytes(n: float) -> str:
    return f"{n / 1e9:,.2f}"


def by_part(name: str, d: Mapping[str, Any]) -> str:
    """One config's figures, part by part."""
    counts, flops, mem = d["parameters"], d["flops_per_token"], d["memory"]
    decoupled = ", ".join(d["decoupled"]) or "nothing"
    said = [
        f"{name}: {d['architecture']}, {d['layers']} layers ({d['blocks']} blocks) of width {d['dim']}, vocabulary "
        f"{d['vocabulary']:,} ({', '.join(d['modalities'])}), decoupled: {decoupled}",
        "",
        _table(
            ("parameters (M)", "total", "active"),
            [(part, _millions(n), _millions(counts["active_by_part"][part])) for part, n in counts["by_part"].items()]
            + [("all", _millions(counts["total"]), _millions(counts["active"]))],
        ),
    ]
    tokens = {"MFLOPs per token": flops}
    if "patch" in flops:
        tokens = {"MFLOPs per text token": flops, "MFLOPs per latent patch": flops["patch"]}
    for title, counted in tokens.items():
        rows = [(part, _millions(n), _millions(TRAINING_FACTOR * n)) for part, n in counted["by_part"].items()]
        rows.append(("all", _millions(counted["forward"]), _millions(counted["training"])))
        said += ["", _table((title, "forward", "training"), rows)]
    kinds = (mem["without_checkpointing"], mem["with_checkpointing"])
    uses = [use for use in mem["with_checkpointing"] if use != "activations_per_token"]
    memory_rows = [[use, *(_gigabytes(kind[use]) for kind in kinds)] for use in uses]
    memory_rows.append(["kept per token (MB)", *(f"{kind['activations_per_token'] / 1e6:.3f}" for kind in kinds)])
    header = ("predicted GB per rank", "no checkpointing", "activation checkpointing")
    chosen = "with" if mem["activation_checkpointing"] else "without"
    note = f"{d['ranks']} ranks x {d['accumulation']} micro-batches a step; the config is {chosen} checkpointing"
    said += ["", _table(header, memory_rows), "", note]
    return "\n".join(said)


def overview(described: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per config; where pictures are latents, FLOPs of a text token and of a patch."""
    rows = []
    for name, d in described.items():
        kinds = [d["flops_per_token"], *([d["flops_per_token"]["patch"]] if "patch" in d["flops_per_token"] else [])]
        rows.append(
            (
                name,
                _millions(d["parameters"]["total"]),
                _millions(d["parameters"]["active"]),
                " / ".join(_millions(kind["forward"]) for kind in kinds),
                " / ".join(_millions(kind["training"]) for kind in kinds),
                f"{d['tokens_per_batch']:,}",
                str(d["ranks"]),
                _gigabytes(d["memory_bytes_per_rank"]),
            )
        )
    header = ["config", "total (M)", "active (M)", "forward (MFLOPs/token)", "training (MFLOPs/token)"]
    return _table([*header, "tokens per batch", "ranks", "predicted GB per rank"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", metavar="CONFIG | key=value", help="overrides hold for all CONFIGs")
    parser.add_argument("--ranks", type=int, help="ranks that share the model (default: batch / micro_batch)")
    parser.add_argument("--json", nargs="?", const="-", metavar="OUT", help="JSON, to OUT or standard output")
    parser.add_argument("--by-part", action="store_true", help="several configs in detail too, not a row for each")
    arguments = parser.parse_intermixed_args()
    with exit_clearly("describe_model"):
        names = [a for a in arguments.config if "=" not in a or Path(a).suffix in (".yaml", ".yml")]
        overrides = [a for a in arguments.config if a not in names]
        if arguments.json and Path(arguments.json).suffix in (".yaml", ".yml"):
            raise ValueError(f"--json {arguments.json} would overwrite a config: put --json last, or name its file")
        if not names:
            raise ValueError("no CONFIG among the arguments")
        described = {name: describe(load_config(name, overrides), arguments.ranks) for name in names}
        if arguments.json:
            objects = [{"config": name} | d for name, d in described.items()]
            text = json.dumps(objects[0] if len(objects) == 1 else objects, indent=2) + "\n"
            if arguments.json == "-":
                sys.stdout.write(text)
            else:
                Path(arguments.json).write_text(text)
        elif len(described) == 1 or arguments.by_part:
            print("\n\n".join(by_part(name, d) for name, d in described.items()))
        else:
            print(overview(described))


if __name__ == "__main__":
    main()
