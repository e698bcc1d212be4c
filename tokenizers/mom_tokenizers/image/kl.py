"""The image tokenizer that makes latent patches, with the folder of any `diffusers.AutoencoderKL`.

image_tokenizer.json in the folder holds the side of pictures in pixels, and the side of patches in latent positions:

    {"resolution": 256, "patch": 2}

With "log_variance": true as well, each patch also holds the logarithm of the latents' variance after their mean, so
that training can draw from the posterior.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mom_tokenizers.base import read_json
from mom_tokenizers.errors import UserError
from mom_tokenizers.image.autoencoder import SIDECAR, ImageTokenizer, picture

if TYPE_CHECKING:
    from PIL import Image


class KLImageTokenizer(ImageTokenizer):
    """Encodes a PIL picture as (resolution / downsample / patch)^2 latent patches in raster order, and decodes them.

    Each patch is flattened as (c p q), the order of the weights of a convolution whose kernel and stride are `patch`.
    Patches are the means of the VAE's latents, unscaled; a model reads (latents - `latent_shift`) * `latent_scale`.
    Where the VAE's config has `latents_mean` and `latents_std`, one number per channel, latents are standardised by
    those first, and scale and shift refer to the standardised latents. With `log_variance` a row holds the patch_width
    means, and then as many log-variances, of the same standardised latents.
    """

    kind = "kl"
    model_class = "AutoencoderKL"
    sidecar_example = '{"resolution": 256, "patch": 2}'
    size = 1
    """There are no ids, so the modality's span of the vocabulary is a placeholder of one id."""

    def __init__(
        self, model: Any, resolution: int, patch: int = 2, source: Path | None = None, *, log_variance: bool = False
    ):
        super().__init__(model, resolution, source)
        self.patch = patch
        self.log_variance = log_variance
        self._side = resolution // self.downsample
        if self._side % patch:
            raise UserError(f"image: {self._side} x {self._side} latents do not divide into patches of {patch}")
        self._mean_C11, self._std_C11 = _standard(model.config)
        self.latent_scale, self.latent_shift = _scale_and_shift(model.config)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches of a picture."""
        return self._side // self.patch, self._side // self.patch

    @property
    def patches_per_image(self) -> int:
        rows, cols = self.grid
        return rows * cols

    @property
    def patch_width(self) -> int:
        """The number of values of a patch: latent channels times `patch` squared."""
        return int(self._model.config.latent_channels) * self.patch**2

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> KLImageTokenizer:
        """Load a folder that `AutoencoderKL.save_pretrained` wrote and that also holds image_tokenizer.json. Raises
        UserError where it is not such a folder."""
        path = Path(path)
        resolution, patch = cls._sidecar(path, "resolution"), cls._sidecar(path, "patch")
        return cls(cls._load(path, device), resolution, patch, path, log_variance=cls._log_variance(path))

    @classmethod
    def _log_variance(cls, path: Path) -> bool:
        value = read_json(cls.files(path)[SIDECAR]).get("log_variance", False)
        if not isinstance(value, bool):
            raise UserError(f"{path / SIDECAR}: 'log_variance' must be true or false, not {value!r}")
        return value

    @classmethod
    def stored_size(cls, path: str | Path) -> int:
        """The size of a stored tokenizer, which is always 1. Raises UserError where a file is missing."""
        cls.files(path)
        return cls.size

    @classmethod
    def stored_latents(cls, path: str | Path) -> dict[str, int | float]:
        """{"patch_width", "latent_scale", "latent_shift"} of a stored tokenizer, read from its configs alone. With
        log-variances there is also {"log_variance": True}, and rows are twice as wide as patch_width."""
        path = Path(path)
        config = read_json(cls.files(path)["config.json"])
        scale, shift = _scale_and_shift(config)
        width = int(config.get("latent_channels", 4)) * cls._sidecar(path, "patch") ** 2
        more = {"log_variance": True} if cls._log_variance(path) else {}
        return {"patch_width": width, "latent_scale": scale, "latent_shift": shift, **more}

    def _settings(self) -> dict[str, int]:
        more = {"log_variance": True} if self.log_variance else {}
        return {"resolution": self.resolution, "patch": self.patch, **more}

    def encode(self, value: Image.Image) -> np.ndarray:
        """The patches of a picture, float16 (patches_per_image, patch_width), or twice as wide with log-variances.
        Raises UserError where a latent exceeds float16."""
        return self.encode_batch([value])[0]

    def encode_batch(self, values: Sequence[Image.Image]) -> list[np.ndarray]:
        """The result of `encode` for each picture. They are encoded in batches, so the last bit may differ."""
        batches = (values[i : i + self._batch] for i in range(0, len(values), self._batch))
        return [patches for batch in batches for patches in self._encode(batch)]

    def _encode(self, images: Sequence[Image.Image]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            posterior = self._model.encode(self._pixels(images)).latent_dist
        mean = (posterior.mean.float().cpu().numpy() - self._mean_C11) / self._std_C11
        limit = np.abs(mean).max()
        if not limit <= np.finfo(np.float16).max:
            raise UserError(f"image: the VAE gives a latent of magnitude {limit}, which float16 does not hold")
        parts = [mean]
        if self.log_variance:
            parts.append(posterior.logvar.float().cpu().numpy() - 2 * np.log(self._std_C11))
        return np.concatenate([patchify(part, self.patch) for part in parts], axis=2).astype(np.float16)

    def decode(self, values: np.ndarray) -> Image.Image:
        """The RGB picture of one picture's patches, float (patches_per_image, patch_width), as `encode` gives them.
        Log-variances after the means are ignored. Raises UserError for another shape, and for values that are not
        finite."""
        import torch

        patches = np.asarray(values, np.float32)
        if self.log_variance and patches.ndim == 2 and patches.shape[1] == 2 * self.patch_width:
            patches = patches[:, : self.patch_width]
        if patches.shape != (self.patches_per_image, self.patch_width):
            raise UserError(
                f"image: patches of shape {patches.shape} given, a picture has "
                f"({self.patches_per_image}, {self.patch_width})"
            )
        if not np.isfinite(patches).all():
            raise UserError("image: the patches hold values that are not finite")
        latents = torch.from_numpy(unpatchify(patches[None], self.patch, *self.grid) * self._std_C11 + self._mean_C11)
        with torch.inference_mode():
            return picture(self._model.decode(latents.to(self._model.device, self._model.dtype)).sample[0])


def patchify(latents: np.ndarray, patch: int) -> np.ndarray:
    """Latents (B, C, H, W) as patches (B, H/p * W/p, C*p*p) in raster order, each flattened as (c p q)."""
    B, C, H, W = latents.shape
    grid = latents.reshape(B, C, H // patch, patch, W // patch, patch)
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch * patch)


def unpatchify(patches: np.ndarray, patch: int, rows: int, cols: int) -> np.ndarray:
    """The inverse of `patchify`: patches (B, rows * cols, C*p*p) as latents (B, C, rows * p, cols * p)."""
    B, count, width = patches.shape
    assert count == rows * cols, f"{count} patches are no grid of {rows} x {cols}"
    grid = patches.reshape(B, rows, cols, width // patch**2, patch, patch)
    return grid.transpose(0, 3, 1, 4, 2, 5).reshape(B, -1, rows * patch, cols * patch)


def _standard(config: Any) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation) of each latent channel, float32 (C, 1, 1); 0 and 1 where the VAE's config has none."""
    channels = int(config.latent_channels)
    values = []
    for key, default in (("latents_mean", 0.0), ("latents_std", 1.0)):
        value = np.asarray(config.get(key) or [default] * channels, np.float32)
        if value.shape != (channels,) or not np.isfinite(value).all() or (default and value.min() <= 0):
            raise UserError(f"image: the VAE's {key} must be {channels} numbers, one a channel, deviations above 0")
        values.append(value[:, None, None])
    return values[0], values[1]


def _scale_and_shift(config: Any) -> tuple[float, float]:
    """(scale, shift) of a VAE's config. Where they are absent, the scale is 0.18215, diffusers' default, and the shift
    is 0."""
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor")
    return float(scale), float(shift or 0.0)
