"""Convert a published VQGAN checkpoint (taming-transformers' VQModel, Chameleon's) to an image tokenizer of kind vq.

    mom convert-vqgan vqgan.ckpt --output tokenizers/image                     # Chameleon: 512 pixels
    mom convert-vqgan last.ckpt --output tokenizers/image --resolution 256     # ImageNet f16: 256 codes

DIR gets a diffusers.VQModel (config.json, safetensors) and image_tokenizer.json. Sizes come from the tensors' shapes.
Pickled checkpoints are read without running what they hold; discriminators and perceptual losses are left out.
"""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tokenizers.image.autoencoder import VQImageTokenizer
from mom_tools.options import add_json, command_parser
from mom_tools.output import write_json

LEFT_OUT = ("loss.", "model_ema.")  # needed by training alone

# Names below encoder. and decoder. There the decoder's levels are numbered from the picture on, in diffusers from the
# codes on.
_RENAMES = (
    (r"norm_out\.", "conv_norm_out."),
    (r"mid\.block_1\.", "mid_block.resnets.0."),
    (r"mid\.block_2\.", "mid_block.resnets.1."),
    (r"mid\.attn_1\.", "mid_block.attentions.0."),
    (r"down\.(\d+)\.block\.(\d+)\.", r"down_blocks.\1.resnets.\2."),
    (r"down\.(\d+)\.attn\.(\d+)\.", r"down_blocks.\1.attentions.\2."),
    (r"down\.(\d+)\.downsample\.conv\.", r"down_blocks.\1.downsamplers.0.conv."),
    (r"up\.(\d+)\.block\.(\d+)\.", r"up_blocks.\1.resnets.\2."),
    (r"up\.(\d+)\.attn\.(\d+)\.", r"up_blocks.\1.attentions.\2."),
    (r"up\.(\d+)\.upsample\.conv\.", r"up_blocks.\1.upsamplers.0.conv."),
)
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a .safetensors, .ckpt or .pt file. Raises ValueError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            values: Any = load_file(path)
        else:
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, and loading that could run code: {str(error).splitlines()[0]} Where you "
            "trust it, save its state dict alone: torch.save(torch.load(PATH, weights_only=False)['state_dict'], NEW)"
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(f"{path}: not a checkpoint that can be read: {error}") from error
    if isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        values = values["state_dict"]
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise UserError(f"{path}: expected a state dict, names to tensors")
    return values


def rename(name: str, levels: int) -> str:
    """The name that diffusers gives to one of the published tensors."""
    part, _, rest = name.partition(".")
    if part not in ("encoder", "decoder"):
        return name
    for pattern, replacement in _RENAMES:
        rest, changed = re.subn(f"^{pattern}", replacement, rest)
        if changed:
            break
    rest = re.sub(r"^up_blocks\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", rest)
    if ".attentions." in rest:
        rest = re.sub(r"(attentions\.\d+)\.(\w+)\.", lambda m: f"{m[1]}.{_ATTENTION.get(m[2], m[2])}.", rest)
    return f"{part}.{rest.replace('nin_shortcut', 'conv_shortcut')}"


def model_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of diffusers.VQModel, from names and shapes of tensors. Raises ValueError where the tensors are not
    those of a VQGAN."""
    needed = ("encoder.conv_in", "encoder.conv_out", "quantize.embedding", "decoder.conv_out")
    if missing := [name for name in needed if f"{name}.weight" not in tensors]:
        raise UserError(
            f"not a VQGAN with a plain codebook (taming's VQModel): it lacks {', '.join(missing)}; its names "
            f"are such as {', '.join(list(tensors)[:3]) or '(none)'}"
        )

    def count(pattern: str) -> int:
        """How many different numbers the names have at the place that the pattern marks."""
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    levels = count(r"encoder\.down\.(\d+)\.block\.")
    blocks = count(r"encoder\.down\.0\.block\.(\d+)\.")
    width = [tensors.get(f"encoder.down.{level}.block.0.conv1.weight") for level in range(levels)]
    if not blocks or any(w is None for w in width):
        raise UserError("not a VQGAN: its encoder has no levels encoder.down.N.block.N")
    attention = {
        side: [count(rf"{coder}\.{side}\.{level}\.attn\.(\d+)\.") > 0 for level in range(levels)]
        for coder, side in (("encoder", "down"), ("decoder", "up"))
    }
    codes, code_width = tensors["quantize.embedding.weight"].shape
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "down_block_types": tuple(f"{'Attn' * here}DownEncoderBlock2D" for here in attention["down"]),
        "up_block_types": tuple(f"{'Attn' * here}UpDecoderBlock2D" for here in reversed(attention["up"])),
        "block_out_channels": tuple(w.shape[0] for w in width if w is not None),
        "layers_per_block": blocks,
        "latent_channels": tensors["encoder.conv_out.weight"].shape[0],
        "num_vq_embeddings": codes,
        "vq_embed_dim": code_width,
        "norm_num_groups": 32,
        "mid_block_add_attention": any(name.startswith("encoder.mid.attn_1.") for name in tensors),
    }


def convert(tensors: Mapping[str, Tensor]) -> tuple[Any, list[str]]:
    """The VQModel, and the names of the checkpoint's bookkeeping that have no place in it. Raises UserError where a
    tensor of the model is missing or has another shape, or where one of encoder or decoder has no place."""
    config = model_config(tensors)
    model: Any = VQModel(**config)
    wanted, levels = model.state_dict(), len(config["block_out_channels"])
    placed: dict[str, Tensor] = {}
    homeless = []
    for name, value in tensors.items():
        if name.startswith(LEFT_OUT):
            continue
        theirs = rename(name, levels)
        if theirs not in wanted:
            homeless.append(name)
            continue
        if ".attentions." in theirs and value.ndim == 4:  # a 1 x 1 convolution there, a Linear here
            value = value[:, :, 0, 0]
        if value.shape != wanted[theirs].shape:
            raise UserError(f"{name} is {tuple(value.shape)}, the model wants {tuple(wanted[theirs].shape)}")
        placed[theirs] = value.float()
    if missing := sorted(set(wanted) - set(placed)):
        raise UserError(
            f"{len(missing)} tensors of the model have no source, e.g. {missing[0]}; "
            f"without a place: {', '.join(homeless[:5]) or 'none'}"
        )
    if more := [
        name for name in homeless if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    ]:
        raise UserError(
            f"{len(more)} tensors have no place in a VQModel, so the pictures would not be those of this checkpoint: "
            + ", ".join(more[:5])
        )
    model.load_state_dict(placed)
    return model, homeless


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="published weights, a .ckpt, .pt or .safetensors file")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the tokenizer")
    parser.add_argument("--resolution", type=int, default=512, help="side of pictures in pixels (default: %(default)s)")
    add_json(parser)
    arguments = parser.parse_args()
    with exit_clearly():
        tensors = read_checkpoint(arguments.checkpoint)
        model, homeless = convert(tensors)
        tokenizer = VQImageTokenizer(model, arguments.resolution)
        tokenizer.save(arguments.output)
        figures = {
            "tensors": len(model.state_dict()),
            "parameters": sum(p.numel() for p in model.parameters()),
            "codes": tokenizer.size,
            "codes_per_image": tokenizer.codes_per_image,
            "left_out": sum(name.startswith(LEFT_OUT) for name in tensors),
            "without_place": homeless,
            "fingerprint": tokenizer.fingerprint(),
        }
        if not write_json(arguments.json, figures, indent=None):
            return
        print(
            f"{arguments.output}: {figures['parameters']:,} parameters in {figures['tensors']} tensors, "
            f"{tokenizer.size:,} codes, {tokenizer.codes_per_image:,} a picture of {arguments.resolution} pixels"
        )
        if figures["left_out"]:
            print(f"left out, as only training needs them: {figures['left_out']} tensors ({', '.join(LEFT_OUT)})")
        if homeless:
            print(f"without a place: {', '.join(homeless)}")


if __name__ == "__main__":
    main()
