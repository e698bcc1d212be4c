"""The latent autoencoders of diffusers behind one interface: what each class calls things, and where its scale is.

    AutoencoderKL             Stable Diffusion, SD3, FLUX.1
    AutoencoderKLFlux2        FLUX.2
    AutoencoderDC             SANA
    AutoencoderRAE            representation autoencoders (RAE) with the encoders DINOv2 and MAE
    AutoencoderKLQwenImage    Qwen-Image
    AutoencoderKLHunyuanImage HunyuanImage 2.1
    AutoencoderKLCosmos       Cosmos 1, pictures of one frame

A folder's config.json names the class. What the class's own pipeline does to latents before its model reads them is
split in two here: latents are standardised channel by channel where the checkpoint has means and deviations, and that
is what is stored; a number for the scale and one for the shift are left to the model, which reads
(latents - shift) * scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mom_tokenizers.errors import UserError

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]


@dataclass(frozen=True)
class _Class:
    """What distinguishes a class of autoencoders. The numbers are read from a folder's config.json, whose missing keys
    have the defaults of diffusers."""

    channels: Callable[[Config], int]
    """The number of channels of a latent."""
    factor: Callable[[Config], int]
    """The number of pixels, along a side, for which there is one latent."""
    frames: bool = False
    """Whether the model is one of videos, whose pixels and latents have an axis for the frames: (B, C, 1, H, W)."""
    scale: float = 1.0
    """The scale where the config has no scaling_factor, or null."""
    variance: bool = True
    """Whether the encoder gives a distribution, and not the latents alone."""


def _levels(key: str, default: int) -> Callable[[Config], int]:
    """The factor of a model that halves the sides between its levels; `key` lists something for each level."""
    return lambda config: 2 ** (len(config[key]) - 1 if config.get(key) else default)


CLASSES: dict[str, _Class] = {
    "AutoencoderKL": _Class(
        channels=lambda c: int(c.get("latent_channels", 4)), factor=_levels("block_out_channels", 0), scale=0.18215
    ),
    "AutoencoderKLFlux2": _Class(
        channels=lambda c: int(c.get("latent_channels", 32)), factor=_levels("block_out_channels", 3)
    ),
    "AutoencoderDC": _Class(
        channels=lambda c: int(c.get("latent_channels", 32)),
        factor=_levels("encoder_block_out_channels", 5),
        variance=False,
    ),
    "AutoencoderRAE": _Class(
        channels=lambda c: int(c.get("encoder_hidden_size", 768)),
        factor=lambda c: int(c.get("patch_size", 16)),
        variance=False,
    ),
    "AutoencoderKLQwenImage": _Class(
        channels=lambda c: int(c.get("z_dim", 16)),
        factor=lambda c: 2 ** len(c.get("temperal_downsample", (0, 0, 0))),
        frames=True,
    ),
    "AutoencoderKLHunyuanImage": _Class(
        channels=lambda c: int(c["latent_channels"]), factor=lambda c: int(c["spatial_compression_ratio"])
    ),
    "AutoencoderKLCosmos": _Class(
        channels=lambda c: int(c.get("latent_channels", 16)),
        factor=lambda c: int(c.get("spatial_compression_ratio", 8)),
        frames=True,
        variance=False,
    ),
}


@dataclass(frozen=True)
class LatentModel:
    """An autoencoder as its config, and for FLUX.2 its weights, describe it. Nothing here needs the model itself."""

    name: str
    """The class in diffusers."""
    channels: int
    """C, the number of channels of a latent."""
    factor: int
    """The number of pixels, along a side, for which there is one latent."""
    side: int | None
    """The only height and width of pictures, in pixels, that the autoencoder gives back. None where it takes any
    multiple of `factor`, and any rectangle."""
    scale: float
    shift: float
    """A model reads (latents - shift) * scale."""
    mean_Cpq: np.ndarray
    std_Cpq: np.ndarray
    """By these, float32 (C, period, period), latents are standardised before they are stored. The latent at row r and
    column k has the statistics at [:, r % period, k % period]."""

    @property
    def period(self) -> int:
        """The side of the patches in which the statistics repeat: 2 for FLUX.2, which has some for each place in
        patches of 2 x 2, otherwise 1. The side of the patches must be a multiple of it."""
        return int(self.mean_Cpq.shape[1])

    @property
    def has_variance(self) -> bool:
        """Whether the encoder gives a variance beside the mean."""
        return CLASSES[self.name].variance

    def standardised(self, mean_BCHW: np.ndarray) -> np.ndarray:
        """Latents as they are stored, float32 (B, C, H, W)."""
        return (mean_BCHW - self._over(self.mean_Cpq, mean_BCHW)) / self._over(self.std_Cpq, mean_BCHW)

    def log_variance(self, log_variance_BCHW: np.ndarray) -> np.ndarray:
        """The log-variances of the latents as they are stored, float32 (B, C, H, W)."""
        return log_variance_BCHW - 2 * np.log(self._over(self.std_Cpq, log_variance_BCHW))

    def original(self, stored_BCHW: np.ndarray) -> np.ndarray:
        """The inverse of `standardised`."""
        return stored_BCHW * self._over(self.std_Cpq, stored_BCHW) + self._over(self.mean_Cpq, stored_BCHW)

    def _over(self, values_Cpq: np.ndarray, latents_BCHW: np.ndarray) -> np.ndarray:
        if self.period == 1:
            return values_Cpq
        rows, cols = (n // self.period for n in latents_BCHW.shape[2:])
        return np.tile(values_Cpq, (1, rows, cols))

    def encode(self, model: Any, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(latents (B, C, H / factor, W / factor), their log-variances or None) of pixels in [-1, 1], as the model
        gives them. The latents are the mean of the encoder's distribution, where it gives one."""
        if self.name == "AutoencoderRAE":  # it normalises pixels in [0, 1] itself, by what its encoder was trained with
            return model.encode((pixels_BCHW + 1) / 2).latent, None
        pixels = pixels_BCHW.unsqueeze(2) if self._frames else pixels_BCHW
        encoded = model.encode(pixels)
        if not hasattr(encoded, "latent_dist"):
            return encoded.latent, None
        latents = encoded.latent_dist.mode()
        log_variance = encoded.latent_dist.logvar if self.has_variance else None
        if self._frames:
            latents, log_variance = latents[:, :, 0], None if log_variance is None else log_variance[:, :, 0]
        return latents, log_variance

    def decode(self, model: Any, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """The pixels (B, 3, H, W), in about [-1, 1], of latents that the model's encoder might have given."""
        pixels = model.decode(latents_BCHW.unsqueeze(2) if self._frames else latents_BCHW).sample
        if self.name == "AutoencoderRAE":
            return pixels * 2 - 1
        return pixels[:, :, 0] if self._frames else pixels

    @property
    def _frames(self) -> bool:
        return CLASSES[self.name].frames


def class_of(config: Config, where: object) -> str:
    """The class that a config.json names; without a name it is AutoencoderKL. Raises UserError for one that is not in
    `CLASSES`."""
    name = str(config.get("_class_name", "AutoencoderKL"))
    if name not in CLASSES:
        raise UserError(f"{where}: its class is {name}; the autoencoders that give latents are {', '.join(CLASSES)}")
    return name


def described(name: str, config: Config, tensor: Callable[[str], np.ndarray], where: object) -> LatentModel:
    """The description of a model of class `name`. `tensor` gives a tensor of the weights by its name, float32; it is
    called for FLUX.2 alone, whose statistics are among the weights. Raises UserError for statistics that do not fit,
    and for what this adapter does not read."""
    its = CLASSES[name]
    try:
        channels, factor = its.channels(config), its.factor(config)
    except KeyError as error:
        raise UserError(f"{where}: the config.json of a {name} must have {error}") from None
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    side = None
    if name == "AutoencoderRAE":
        if not config.get("reshape_to_2d", True):
            raise UserError(f"{where}: an AutoencoderRAE must have reshape_to_2d: true, so that its latents are a grid")
        side = factor * (int(config.get("encoder_input_size", 224)) // int(config.get("encoder_patch_size", 14)))
        # Its encode() standardises and scales by itself, so that nothing is left to do.
        scale, shift = 1.0, None
        mean, std = _channels(None, None, channels, where)
    elif name == "AutoencoderKLFlux2":
        variance = tensor("bn.running_var") + np.float32(config.get("batch_norm_eps", 1e-4))
        mean, std = _patches(tensor("bn.running_mean"), np.sqrt(variance), channels, where)
    else:
        mean, std = _channels(config.get("latents_mean"), config.get("latents_std"), channels, where, its.frames)
    return LatentModel(
        name,
        channels,
        factor,
        side,
        float(its.scale if scale is None else scale),
        float(shift or 0.0),
        mean,
        std,
    )


def of_model(model: Any) -> LatentModel:
    """The description of a model that has been built."""
    name = class_of({"_class_name": type(model).__name__}, "image")

    def tensor(key: str) -> np.ndarray:
        return model.get_buffer(key).detach().float().cpu().numpy()

    return described(name, model.config, tensor, name)


def of_folder(config: Config, weights: Sequence[Path], folder: Path) -> LatentModel:
    """The description of a stored model. For FLUX.2 its statistics are read from the weights, and nothing else is."""

    def tensor(key: str) -> np.ndarray:
        from safetensors import safe_open

        for file in weights:
            with safe_open(file, framework="pt") as stored:  # numpy has no bfloat16
                if key in stored.keys():  # noqa: SIM118, this is no dictionary
                    return stored.get_tensor(key).float().numpy()
        raise UserError(f"{folder}: the weights lack {key}, the statistics by which FLUX.2 standardises latents")

    return described(class_of(config, folder), config, tensor, folder)


def _channels(mean: Any, std: Any, channels: int, where: object, frames: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(mean, deviation) of each channel, float32 (C, 1, 1); 0 and 1 where the config has none."""
    values = []
    for key, value, default in (("latents_mean", mean, 0.0), ("latents_std", std, 1.0)):
        array = np.asarray(value or [default] * channels, np.float32)
        if frames and array.ndim == 1 and array.size % channels == 0:
            array = array.reshape(channels, -1)[:, 0]  # Cosmos lists all frames of a channel; a picture is the first
        if array.shape != (channels,) or not np.isfinite(array).all() or (default and array.min() <= 0):
            raise UserError(
                f"image: the VAE's {key} must be {channels} numbers, one a channel, deviations above 0 ({where})"
            )
        values.append(array[:, None, None])
    return values[0], values[1]


def _patches(mean: np.ndarray, std: np.ndarray, channels: int, where: object) -> tuple[np.ndarray, np.ndarray]:
    """(mean, deviation), float32 (C, 2, 2), of FLUX.2's patches, whose 4C values are in the order (c p q)."""
    for name, value in (("bn.running_mean", mean), ("bn.running_var", std)):
        if value.shape != (4 * channels,) or not np.isfinite(value).all() or (value is std and value.min() <= 0):
            raise UserError(f"{where}: {name} must be {4 * channels} numbers, variances above 0")
    return mean.reshape(channels, 2, 2), std.reshape(channels, 2, 2)
