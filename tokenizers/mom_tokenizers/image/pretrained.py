"""Takes a published latent autoencoder as the tokenizer of a corpus, and measures what it brings back of the corpus."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mom_tokenizers.errors import UserError
from mom_tokenizers.image.autoencoder import SIDECAR
from mom_tokenizers.image.kl import KLImageTokenizer
from mom_tokenizers.image.measures import psnr
from mom_tokenizers.image.training import SHOWN, PretrainedConfig, draw


def files_of(folder: Path) -> list[Path]:
    """The config.json and the weights in the folder of an autoencoder. Raises UserError where they are missing."""
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json there; image.folder must be an autoencoder's folder of diffusers")
    if not weights:
        raise UserError(f"{folder}: no .safetensors weights there (pickled checkpoints are not loaded)")
    return [folder / "config.json", *weights]


def take_pretrained(
    config: PretrainedConfig, images: Sequence[np.ndarray], directory: Path, device: str = "cpu"
) -> dict[str, Any]:
    """Copy the autoencoder into `directory` with its image_tokenizer.json, and encode and decode pictures uint8 (3,
    resolution, resolution) on `device`. Saves reconstructions.png beside it and returns the figures of the round trip.

    "deviation" and "largest" are the standard deviation and the largest magnitude of what a model reads: a deviation
    far from 1 says that scale or statistics are not those of these pictures. Raises UserError where the folder is no
    such autoencoder, or cannot be used as the config says.
    """
    for file in files_of(config.folder):
        shutil.copyfile(file, directory / file.name)
    settings = config.model_dump(include={"resolution", "patch", "tokens"}, exclude_none=True)
    more = {"log_variance": True} if config.log_variance else {}
    (directory / SIDECAR).write_text(json.dumps(settings | more) + "\n")
    tokenizer = KLImageTokenizer.load(directory, device)
    patches = tokenizer.encode_batch([Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in images])
    decoded = np.stack([np.asarray(tokenizer.decode(p)).transpose(2, 0, 1) for p in patches])
    draw(np.stack(images[:SHOWN]), decoded[:SHOWN], directory / "reconstructions.png")
    originals = np.stack(images) / 255
    means = np.stack([p[:, : tokenizer.patch_width] for p in patches]).astype(np.float32)
    read = (means - tokenizer.latent_shift) * tokenizer.latent_scale
    mean_colour = np.broadcast_to(originals.mean((2, 3), keepdims=True), originals.shape)
    return {
        "model_class": tokenizer.latents.name,
        "images": 0,
        "held_out": len(images),
        "psnr": psnr(decoded / 255, originals),
        "psnr_of_mean_colour": psnr(mean_colour, originals),
        "patches_per_image": tokenizer.patches_per_image,
        "patch_width": tokenizer.patch_width,
        "latent_scale": round(tokenizer.latent_scale, 5),
        "latent_shift": round(tokenizer.latent_shift, 5),
        "deviation": round(float(read.std()), 3),
        "largest": round(float(np.abs(read).max()), 2),
    }
