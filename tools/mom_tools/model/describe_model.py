"""Compute what the model of a config costs before anything is built: parameters, FLOPs per token, memory per rank.

    mom describe configs/chameleon/1.5b-mom.yaml
    mom describe configs/transfusion/760m-mom.yaml training.micro_batch=2 --ranks 64 --json
    mom describe configs/chameleon/[!_]*.yaml           # one row for each

Every figure comes from a formula in mom_train/cost, and no weight is created. Memory is predicted, not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.options import add_configs, add_json, command_parser, configs_and_overrides
from mom_tools.output import markdown_table, write_json
from mom_train.config.files import load_config
from mom_train.config.run import RunConfig
from mom_train.config.width import attention_scale, factors
from mom_train.cost.flops import (
    TRAINING_FACTOR,
    active_parameters,
    forward_flops_per_token,
    optimizer_flops,
    parameters,
)
from mom_train.cost.memory import memory


def describe(config: RunConfig, ranks: int | None = None) -> dict[str, Any]:
    """All figures of one config. By default, `ranks` is the number that needs no accumulation, as in the paper, and
    with a ramp of the batch none at its smallest.

    Raises ValueError where the batch cannot be divided evenly among the ranks.
    """
    if ranks is None:
        ranks = max(1, min(config.training.batches.values()) // config.training.micro_batch)
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: at least one rank")
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

    predicted = memory(config, ranks)
    noise = noise_schedule(config)
    return {
        "architecture": model.architecture,
        "decoupled": list(model.decoupled),
        "dim": model.dim,
        "base_dim": model.base_dim,
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
        # of a whole step, not among the training FLOPs; 0 with AdamW
        "optimizer_flops_per_step": optimizer_flops(config),
        "width_transfer": None if model.base_dim is None else transfer(config),
        "tokens_per_batch": config.training.batch * length,
        "batch_ramp": [{"until": e.until, "tokens_per_batch": e.batch * length} for e in config.training.batch_ramp],
        "ranks": ranks,
        "accumulation": accumulation,
        "memory_bytes_per_rank": predicted[predicted["chosen"]]["total"],
        "memory": predicted,
        **({} if noise is None else {"noise_schedule": noise}),
    }


RAE_BASE = 4096
"""The number of values of a picture that needs no shift, with which RAE (arXiv 2510.11690) computes its shift."""


def noise_schedule(config: RunConfig) -> dict[str, Any] | None:
    """How far the noise schedule is shifted for the pictures of data.train, or None without diffusion.

    {"prediction", "steps", "shift", "shift_base", "draw", "pictures": [{"patches", "values", "alpha",
    "alpha_for_4096"}, ...]}, with an entry in "pictures" for each number of patches that the pictures in the first
    shard of a dataset have. There is none for a dataset that is not here.
    """
    diffusion = config.objective.diffusion
    if diffusion is None:
        return None
    import numpy as np  # these are for diffusion alone

    from mom_data.shards.dataset import TokenDataset
    from mom_data.shards.format import LATENT_BIT

    found: set[int] = set()
    for source in config.data.train:
        if source.path is None or not (Path(source.path) / "manifest.json").is_file():
            continue
        dataset = TokenDataset(source.path)
        if dataset.manifest["latent_width"] and dataset.shards:
            index = dataset.index(0)
            found.update(np.unique(index.segment_length[index.segment_modality >= LATENT_BIT]).tolist())
    pictures = [
        {
            "patches": n,
            "values": n * diffusion.patch_width,
            "alpha": diffusion.alpha(n),
            "alpha_for_4096": math.sqrt(n * diffusion.patch_width / RAE_BASE),
        }
        for n in sorted(found)
    ]
    settings = diffusion.model_dump(include={"prediction", "steps", "shift", "shift_base", "draw"})
    return {**settings, "pictures": pictures}


def _noise_schedule(d: Mapping[str, Any]) -> str:
    """The noise schedule in one sentence for each size of pictures."""
    drawn = "" if d["draw"] == "uniform" else ", logit-normal draw"
    said = f"noise schedule: {d['prediction']}, {d['steps']:,} timesteps{drawn}; "
    shifted = d["shift"] is not None or d["shift_base"] is not None
    if not d["pictures"]:
        if d["shift_base"] is not None:
            return f"{said}alpha = sqrt(values / {d['shift_base']:,}), and the shards are not here to count the values"
        return said + (f"shifted by alpha = {d['shift']:g}" if shifted else "not shifted")
    parts = []
    for p in d["pictures"][:8]:
        size = f"pictures of {p['patches']} patches, {p['values']:,} values"
        if shifted:
            parts.append(f"{size}: shifted by alpha = {p['alpha']:.3g}")
        else:
            parts.append(f"{size}: not shifted (shift_base: {RAE_BASE} would be alpha = {p['alpha_for_4096']:.3g})")
    more = f"; and {len(d['pictures']) - 8} more sizes" if len(d["pictures"]) > 8 else ""
    return said + "; ".join(parts) + more


def transfer(config: RunConfig) -> dict[str, Any]:
    """What `model.base_dim` makes of each kind of parameter, as factors: `initial` on the initial values of each map
    that its matrix stacks, `rate`, `weight_decay` and `eps` of AdamW, or `muon` on Muon's rate for each map."""
    muon = config.optimizer.as_muon
    by_muon = [] if muon is None else muon.names(config.model)
    kinds: dict[str, Any] = {}
    for kind, grown in factors(config.model, config.objective.diffusion is not None).items():
        kinds[kind] = {"initial": list(grown.scales)}
        if kind in by_muon:
            kinds[kind] |= {"muon": list(grown.muon)}
        else:
            kinds[kind] |= {"rate": grown.rate, "weight_decay": 1 / grown.rate, "eps": grown.eps}
    return {"kinds": kinds, "attention_scale": attention_scale(config.model)}


def _transfer_table(d: Mapping[str, Any]) -> list[str]:
    found = d["width_transfer"]

    def listed(values: list[float]) -> str:
        return " / ".join(f"{v:.4g}" for v in (values if len({*values}) > 1 else values[:1]))

    rows = []
    for kind, f in found["kinds"].items():
        adamw = [f"{f[key]:.4g}" for key in ("rate", "weight_decay", "eps")] if "rate" in f else ["", "", ""]
        rows.append([kind, listed(f["initial"]), *adamw, listed(f.get("muon", []))])
    header = [f"width {d['dim']}, tuned at {d['base_dim']}: factor on", "initial values", "rate", "weight decay", "eps"]
    muon = any("muon" in f for f in found["kinds"].values())
    said = [
        "",
        markdown_table([*header, "Muon's rate"], rows) if muon else markdown_table(header, [row[:-1] for row in rows]),
    ]
    if found["attention_scale"] is not None:
        said += ["", f"attention scores are multiplied by {found['attention_scale']:.4g}"]
    return said


def _millions(n: float) -> str:
    return f"{n / 1e6:,.1f}"


def _gigabytes(n: float) -> str:
    return f"{n / 1e9:,.2f}"


def by_part(name: str, d: Mapping[str, Any]) -> str:
    """The figures of one config, part by part."""
    counts, flops, mem = d["parameters"], d["flops_per_token"], d["memory"]
    decoupled = ", ".join(d["decoupled"]) or "nothing"
    said = [
        f"{name}: {d['architecture']}, {d['layers']} layers ({d['blocks']} blocks) of width {d['dim']}, vocabulary "
        f"{d['vocabulary']:,} ({', '.join(d['modalities'])}), decoupled: {decoupled}",
        "",
        markdown_table(
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
        said += ["", markdown_table((title, "forward", "training"), rows)]
    if "noise_schedule" in d:
        said += ["", _noise_schedule(d["noise_schedule"])]
    if optimizer := d["optimizer_flops_per_step"]:
        share = optimizer / (flops["training"] * d["tokens_per_batch"])
        said += ["", f"Muon: {optimizer / 1e9:,.1f} GFLOPs a step, {100 * share:.2f} % of a step's training FLOPs"]
    if d["width_transfer"] is not None:
        said += _transfer_table(d)
    names = ("without_checkpointing", "with_selective_checkpointing", "with_checkpointing")
    kinds = [mem[name] for name in names]
    memory_rows = [
        [use.replace("_", " "), *(_gigabytes(kind["by_use"][use]) for kind in kinds)] for use in kinds[0]["by_use"]
    ]
    memory_rows.append(["all", *(_gigabytes(kind["total"]) for kind in kinds)])
    if kinds[0]["host"]:
        memory_rows.append(["host memory", *(_gigabytes(kind["host"]) for kind in kinds)])
    memory_rows.append(["highest in", *(kind["peak_at"].replace("_", " ") for kind in kinds)])
    memory_rows.append(["kept per token (MB)", *(f"{kind['activations_per_token'] / 1e6:.3f}" for kind in kinds)])
    header = ("predicted GB per rank", "no checkpointing", "selective", "activation checkpointing")
    chosen = mem["chosen"].replace("_", " ")
    note = f"{d['ranks']} ranks x {d['accumulation']} micro-batches a step; the config is {chosen}"
    said += ["", markdown_table(header, memory_rows), "", note]
    if ramp := d["batch_ramp"]:
        steps = "; ".join(f"{entry['tokens_per_batch']:,} until step {entry['until']:,}" for entry in ramp)
        said += [f"tokens a batch: {steps}; then {d['tokens_per_batch']:,}, which the figures above are for"]
    return "\n".join(said)


def overview(described: Mapping[str, Mapping[str, Any]]) -> str:
    """A table with a row for each config. Where pictures are latents, it has the FLOPs of a text token and of a
    patch."""
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
    return markdown_table([*header, "tokens per batch", "ranks", "predicted GB per rank"], rows)


def main() -> None:
    parser = command_parser(__doc__)
    add_configs(parser)
    parser.add_argument("--ranks", type=int, help="ranks that share the model (default: batch / micro_batch)")
    add_json(parser)
    parser.add_argument(
        "--by-part", action="store_true", help="describe each of several configs in detail, instead of in one row"
    )
    arguments = parser.parse_intermixed_args()
    with exit_clearly():
        if arguments.json and Path(arguments.json).suffix in (".yaml", ".yml"):
            raise UserError(f"--json {arguments.json} would overwrite a config: put --json last, or name its file")
        names, overrides = configs_and_overrides(arguments.config)
        if arguments.ranks is not None and arguments.ranks < 1:
            raise UserError(f"--ranks {arguments.ranks}: at least 1")
        described = {name: describe(load_config(name, overrides), arguments.ranks) for name in names}
        if arguments.json:
            objects = [{"config": name} | d for name, d in described.items()]
            write_json(arguments.json, objects[0] if len(objects) == 1 else objects, indent=2)
        elif len(described) == 1 or arguments.by_part:
            print("\n\n".join(by_part(name, d) for name, d in described.items()))
        else:
            print(overview(described))


if __name__ == "__main__":
    main()
