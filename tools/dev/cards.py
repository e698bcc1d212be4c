"""Writes docs/reference/cards: what follows from each config, and what was measured with it.

python tools/dev/cards.py            # writes the pages
python tools/dev/cards.py --check    # exits with code 2 if a figure on a page no longer follows from the code

Parameters, FLOPs and memory are computed from the config (mom_train/cost). Losses come from
docs/reference/cards/measured.yaml, which also says what the config was when they were measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.model.describe_model import describe
from mom_train.config.files import load_config
from mom_train.config.run import RunConfig

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs/reference/cards"
MEASURED = OUT / "measured.yaml"
TITLES = {
    "chameleon": "Chameleon: text and picture ids",
    "chameleon_speech": "Chameleon + Speech: text, picture ids and speech units",
    "transfusion": "Transfusion: text and picture latents",
    "ablation": "Table 3 of the paper: which projections are decoupled",
    "experiments": "Experiments beyond the paper",
    "mini": "The paper in miniature",
    "demo": "The demo",
}
"""Page -> its title. Configs of configs/<page>/ stand on it; those of configs/ itself on the page of the demo."""
HEAD = """\
# {title}

Each card says what a config is, what follows from it, and what was measured with it. `tools/dev/cards.py` makes this
page; a test fails when one of its figures no longer follows from the code. Memory is predicted for each rank, with the
number of ranks that needs no accumulation of gradients. A token's FLOPs are those of its forward and backward pass.
"""


def configs() -> dict[str, list[Path]]:
    """Page -> the configs on it, relative to the repository."""
    found: dict[str, list[Path]] = {page: [] for page in TITLES}
    for path in sorted(ROOT.glob("configs/**/[!_]*.yaml")):
        if not path.stem.endswith("tokenizers"):
            page = path.parent.name if path.parent.name != "configs" else "demo"
            found[page].append(path.relative_to(ROOT))
    return found


def facts(config: RunConfig, described: Mapping[str, Any]) -> dict[str, Any]:
    """What a measured loss depends on, as `as` in measured.yaml holds it."""
    return {
        "parameters": described["parameters"]["total"],
        "training_flops_per_token": described["flops_per_token"]["training"],
        "steps": config.training.steps,
        "tokens_per_batch": described["tokens_per_batch"],
        "learning_rate": config.optimizer.learning_rate,
    }


def _short(tokens: int) -> str:
    """A number of tokens in millions or billions."""
    return f"{tokens / 1e9:,.3g} G" if tokens >= 1e9 else f"{tokens / 1e6:,.3g} M"


def card(path: Path, config: RunConfig, measured: Sequence[Mapping[str, Any]]) -> str:
    """The card of one config. Raises UserError if something was measured with another config of this name."""
    d = describe(config)
    now = facts(config, d)
    flops, training, optimizer = d["flops_per_token"], config.training, config.optimizer
    millions = 1e-6
    tokens = training.steps * d["tokens_per_batch"]
    kinds = {"a token": flops} | ({"a latent patch": flops["patch"]} if "patch" in flops else {})
    rows = [
        ("architecture", f"{d['architecture']}, {d['layers']} layers ({d['blocks']} blocks), width {d['dim']}"),
        ("decoupled by modality", ", ".join(d["decoupled"]) or "nothing"),
        ("vocabulary", f"{d['vocabulary']:,} ids; {', '.join(d['modalities'])}"),
        ("parameters", f"{millions * d['parameters']['total']:,.1f} M, {millions * d['parameters']['active']:,.1f} M "
                       "of them used by each token"),
        *((f"training FLOPs of {kind}", f"{millions * f['training']:,.1f} M") for kind, f in kinds.items()),
        ("training", f"{training.steps:,} steps of {d['tokens_per_batch']:,} tokens, {_short(tokens)} in all"),
        ("optimiser", f"{'Muon' if optimizer.kind == 'muon' else 'AdamW'}, "
                      f"learning rate {optimizer.learning_rate:g}, warm-up {optimizer.warmup:,} steps, "
                      f"{optimizer.schedule}, weight decay {optimizer.weight_decay:g}"),
        ("predicted memory", f"{d['memory_bytes_per_rank'] / 1e9:,.2f} GB on each of {d['ranks']} ranks"),
    ]  # fmt: skip
    mine = [entry for entry in measured if entry["config"] == str(path)]
    for entry in mine:
        if entry["as"] != now:
            differs = ", ".join(f"{k} {v} then, {now.get(k)} now" for k, v in entry["as"].items() if now.get(k) != v)
            raise UserError(
                f"{MEASURED.relative_to(ROOT)}: the losses of {path}, measured on {entry['date']}, are those of "
                f"another config ({differs}): measure them again, or remove the entry"
            )
        losses = ", ".join(f"{name} {value:g}" for name, value in entry["losses"].items())
        made = f"`{entry['command']}` at commit {entry['commit']} on {entry['date']}, {entry['machine']}"
        rows.append(("measured losses", f"{losses} ({made}). {entry['note'].strip()}"))
    if not mine:
        rows.append(("measured losses", "not measured"))
    return "\n".join([f"## {path}\n", *(f"* {name}: {value}" for name, value in rows)]) + "\n"


def pages() -> dict[str, str]:
    """File name -> content of each page."""
    measured = yaml.safe_load(MEASURED.read_text())
    found = configs()
    known = {str(path) for paths in found.values() for path in paths}
    if lost := [entry["config"] for entry in measured if entry["config"] not in known]:
        raise UserError(f"{MEASURED.relative_to(ROOT)}: there is no config {lost[0]}")
    return {
        f"{page}.md": "\n".join(
            [HEAD.format(title=title), *(card(path, load_config(ROOT / path), measured) for path in found[page])]
        )
        for page, title in TITLES.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and say whether the pages are up to date")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the pages (default: docs/reference/cards)")
    arguments = parser.parse_args()
    with exit_clearly():
        for name, content in pages().items():
            path = arguments.out / name
            if not arguments.check:
                path.write_text(content)
            elif not path.exists() or path.read_text() != content:
                raise UserError(f"{path} is not what follows from the code: run python tools/dev/cards.py")


if __name__ == "__main__":
    main()
