"""Write a run's model as safetensors under this project's own names, or for Transformers.

    mom export runs/mine --out exported/
    mom export runs/mine --out exported/ --format transformers

For Transformers, a dense Mamba becomes its own MambaForCausalLM, or FalconMambaForCausalLM where dt, B and C are
normalised; every other model of discrete tokens loads with AutoModelForCausalLM.from_pretrained(DIR,
trust_remote_code=True) where this package is installed. The way back is
`init_from: exported/` in a config, for safetensors of ours and dense Mamba.
"""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import argparse
import json
from pathlib import Path

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.options import add_weights, command_parser
from mom_train.config.migrations import SCHEMA
from mom_train.config.preflight import check_run, check_writable

FORMATS = ("safetensors", "transformers")


def export(run: Path | str, out: Path, step: int | None, form: str, ema: bool) -> None:
    """Write the weights of a run, or their average, into the folder `out`: those of the newest checkpoint, or of one
    step."""
    from safetensors.torch import save_file  # here, for torch takes seconds

    from mom_train.checkpoint.load import load_run
    from mom_train.exchange.published_mamba import mamba_name, to_mamba, transformers_config

    model, config = load_run(run, step, weights="ema" if ema else "model")
    values = {name: value.detach() for name, value in model.named_parameters()}
    texts = {"config.yaml": config.to_yaml(), "vocab.json": config.layout.to_json() + "\n"}
    dense = config.model.architecture == "mamba" and not config.model.decoupled
    ids = {f"{name}_token_id": config.layout.specials[name] for name in ("bos", "eos", "pad")}
    if form == "transformers":
        texts["generation_config.json"] = json.dumps(ids, indent=1) + "\n"
    if form == "transformers" and dense and config.objective.diffusion is None:
        texts["config.json"] = transformers_config(config.model, model.head.weight.shape[0], **ids)
        values = {mamba_name(name): to_mamba(name, value).contiguous() for name, value in values.items()}
    elif form == "transformers":
        if config.objective.diffusion is not None:
            raise UserError("Transformers has no interface for latent patches: export as safetensors")
        if config.layout.mapped or config.layout.placed:
            raise UserError(
                "codes or special ids inside the text's vocabulary have no place in it yet: export as safetensors"
            )
        from mom_train.exchange.transformers_model import REMOTE_CODE, REMOTE_MODULE, MixtureOfMambaConfig

        exported = MixtureOfMambaConfig(
            model=config.model.model_dump(mode="json"),
            vocabulary=[[name, size] for name, size in config.layout.sizes],
            schema=SCHEMA,
            picture_shapes=None if (shapes := config.layout.shapes) is None else shapes.as_json(),
            architectures=["MixtureOfMambaForCausalLM"],
            auto_map={
                "AutoConfig": f"{REMOTE_MODULE}.MixtureOfMambaConfig",
                "AutoModelForCausalLM": f"{REMOTE_MODULE}.MixtureOfMambaForCausalLM",
            },
        )
        texts |= {"config.json": exported.to_json_string(use_diff=False), f"{REMOTE_MODULE}.py": REMOTE_CODE}
        values = {f"model.{name}": value for name, value in values.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(values, out / "model.safetensors", metadata={"format": "pt"})
    for name, text in texts.items():
        (out / name).write_text(text)
    size = sum(value.nbytes for value in values.values())
    print(f"{out}: {len(values)} tensors, {size / 1e6:.1f} MB, {', '.join(texts)}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `export`, except the run."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    add_weights(parser)
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="format (default: %(default)s)")


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    add_options(parser)
    arguments = parser.parse_args()
    with exit_clearly():
        check_run(arguments.run)
        check_writable(arguments.out, "--out")
        export(arguments.run, arguments.out, arguments.step, arguments.format, arguments.ema)


if __name__ == "__main__":
    main()
