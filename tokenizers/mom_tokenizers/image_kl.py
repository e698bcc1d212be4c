"""Image latents: any `diffusers.AutoencoderKL` folder, small or large, with its `image_tokenizer.json`.

The sidecar holds the side of pictures in pixels and the side of patches in latent positions:

    {"resolution": 256, "patch": 2}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mom_tokenizers.bundle import read_json
from mom_tokenizers.image import BATCH, DiffusersImageTokenizer, picture


class KLImageTokenizer(DiffusersImageTokenizer):
    """PIL picture <-> (resolution / downsample / patch)^2 latent patches in raster order, each (c p q) flattened: the
    order of the weights of a convolution whose kernel and stride are `patch`.

    Patches are the means of the VAE's latents, unscaled; a model reads (latents - `latent_shift`) * `latent_scale`.
    """

    kind = "kl"
    model_class = "AutoencoderKL"
    sidecar_example = '{"resolution": 256, "patch": 2}'
    size = 1
    """There are no ids: the modality's span of the vocabulary is a placeholder."""

    def __init__(self, model: Any, resolution: int, patch: int = 2, source: Path | None = None):
        super().__init__(model, resolution, source)
        self.patch = patch
        self._side = resolution // self.downsample
        if self._side % patch:
            raise ValueError(f"image: {self._side} x {self._side} latents do not divide into patches of {patch}")
        if getattr(model.config, "latents_mean", None) or getattr(model.config, "latents_std", None):
            raise ValueError("image: latents_mean and latents_std of each channel are not supported, only one scale")
        self.latent_scale, self.latent_shift = _scale_and_shift(model.config)

    @property
    def patches_per_image(self) -> int:
        return (self._side // self.patch) ** 2

    @property
    def patch_width(self) -> int:
        """Values of a patch: latent channels x `patch` squared."""
        return int(self._model.config.latent_channels) * self.patch**2

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> KLImageTokenizer:
        """From an `AutoencoderKL.save_pretrained` folder that also holds image_tokenizer.json. Raises ValueError."""
        path = Path(path)
        resolution, patch = cls._sidecar(path, "resolution"), cls._sidecar(path, "patch")
        return cls(cls._load(path, device), resolution, patch, path)

    @classmethod
    def stored_size(cls, path: str | Path) -> int:
        """1, as of every tokenizer of this kind."""
        cls.files(path)
        return cls.size

    @classmethod
    def stored_latents(cls, path: str | Path) -> dict[str, int | float]:
        """{"patch_width", "latent_scale", "latent_shift"} of a stored tokenizer, read from its configs alone."""
        path = Path(path)
        config = read_json(cls.files(path)["config.json"])
        scale, shift = _scale_and_shift(config)
        width = int(config.get("latent_channels", 4)) * cls._sidecar(path, "patch") ** 2
        return {"patch_width": width, "latent_scale": scale, "latent_shift": shift}

    def _settings(self) -> dict[str, int]:
        return {"resolution": self.resolution, "patch": self.patch}

    def encode(self, value: Image.Image) -> np.ndarray:
        """float16 (patches_per_image, patch_width). Raises ValueError where a latent exceeds float16."""
        return self.encode_batch([value])[0]

    def encode_batch(self, values: Sequence[Image.Image]) -> list[np.ndarray]:
        """As `encode` of each; in batches, so the last bit may differ."""
        return [patches for i in range(0, len(values), BATCH) for patches in self._encode(values[i : i + BATCH])]

    def _encode(self, images: Sequence[Image.Image]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            latents = self._model.encode(self._pixels(images)).latent_dist.mean.float().cpu().numpy()
        limit = np.abs(latents).max()
        if not limit <= np.finfo(np.float16).max:
            raise ValueError(f"image: the VAE gives a latent of magnitude {limit}, which float16 does not hold")
        return patchify(latents, self.patch).astype(np.float16)

    def decode(self, values: np.ndarray) -> Image.Image:
        """RGB picture of one image's patches (patches_per_image, patch_width), float and unscaled. Raises ValueError
        for another shape, and for values that are not finite."""
        import torch

        patches = np.asarray(values, np.float32)
        if patches.shape != (self.patches_per_image, self.patch_width):
            raise ValueError(
                f"image: patches of shape {patches.shape} given, a picture has "
                f"({self.patches_per_image}, {self.patch_width})"
            )
        if not np.isfinite(patches).all():
            raise ValueError("image: the patches hold values that are not finite")
        latents = torch.from_numpy(unpatchify(patches[None], self.patch)).to(self._model.device, self._model.dtype)
        with torch.inference_mode():
            return picture(self._model.decode(latents).sample[0])


def patchify(latents: np.ndarray, patch: int) -> np.ndarray:
    """(B, C, H, W) -> (B, H/p * W/p, C*p*p): patches in raster order, (c p q) inside."""
    B, C, H, W = latents.shape
    grid = latents.reshape(B, C, H // patch, patch, W // patch, patch)
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch * patch)


def unpatchify(patches: np.ndarray, patch: int) -> np.ndarray:
    """The inverse of `patchify`, for squares: (B, n*n, C*p*p) -> (B, C, n*p, n*p)."""
    B, count, width = patches.shape
    side = round(count**0.5)
    grid = patches.reshape(B, side, side, width // patch**2, patch, patch)
    return grid.transpose(0, 3, 1, 4, 2, 5).reshape(B, -1, side * patch, side * patch)


def _scale_and_shift(config: Any) -> tuple[float, float]:
    """From a VAE's config; 0.18215 is diffusers' default, and an absent shift is none."""
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor")
    return float(scale), float(shift or 0.0)
