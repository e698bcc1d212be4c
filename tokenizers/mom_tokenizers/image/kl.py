"""The image tokenizer that makes latent patches, with the folder of any autoencoder of `latent_models.py`.

image_tokenizer.json in the folder holds the side of pictures in pixels, and the side of patches in latent positions:

    {"resolution": 256, "patch": 2}

In place of "patch" it may hold "tokens", the most patches that a picture may have; the patch is then the smallest that
keeps to it. With "log_variance": true each patch also holds the logarithm of the latents' variance after their mean,
so that training can draw from the posterior.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mom_tokenizers.base import read_json
from mom_tokenizers.errors import UserError
from mom_tokenizers.image.autoencoder import SIDECAR, ImageTokenizer, picture
from mom_tokenizers.image.latent_models import LatentModel, of_folder, of_model
from mom_tokenizers.media.shapes import Grid

if TYPE_CHECKING:
    from PIL import Image

CLIPPED = 1e-3
"""The largest share of a picture's values that may exceed float16 and be clipped. With more the picture is refused."""


class KLImageTokenizer(ImageTokenizer):
    """Encodes a PIL picture as rows x columns of latent patches in raster order, and decodes them.

    Each patch is flattened as (c p q), the order of the weights of a convolution whose kernel and stride are `patch`.
    Patches are the means of the autoencoder's latents, standardised by its means and deviations where it has some
    (`latent_models.py`), and otherwise unscaled; a model reads (latents - `latent_shift`) * `latent_scale`. With
    `log_variance` a row holds the patch_width means, and then as many log-variances, of the same standardised latents.
    """

    kind = "kl"
    model_class = "AutoencoderKL"
    setting_keys = ("resolution", "patch", "tokens", "log_variance")
    sidecar_example = '{"resolution": 256, "patch": 2}, or {"resolution": 256, "tokens": 256}'
    size = 1
    """There are no ids, so the modality's span of the vocabulary is a placeholder of one id."""

    def __init__(
        self, model: Any, resolution: int, patch: int = 2, source: Path | None = None, *, log_variance: bool = False
    ):
        self.latents = of_model(model)
        super().__init__(model, resolution, source)
        _check(self.latents, resolution, patch, log_variance)
        self.patch = patch
        self.log_variance = log_variance
        self._side = resolution // self.downsample
        self.latent_scale, self.latent_shift = self.latents.scale, self.latents.shift

    @property
    def downsample(self) -> int:
        """The number of pixels, along a side, for which there is one latent."""
        return self.latents.factor

    @property
    def patches_per_image(self) -> int:
        """The number of patches of a square picture."""
        rows, cols = self.grid
        return rows * cols

    @property
    def _factor(self) -> int:
        return self.downsample * self.patch

    @property
    def patch_width(self) -> int:
        """The number of values of a patch: latent channels times `patch` squared."""
        return self.latents.channels * self.patch**2

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> KLImageTokenizer:
        """Load a folder that `save_pretrained` of an autoencoder wrote and that also holds image_tokenizer.json. Raises
        UserError where it is not such a folder."""
        path = Path(path)
        described, resolution, patch, log_variance = cls._stored(path)
        return cls(cls._load_class(path, device, described.name), resolution, patch, path, log_variance=log_variance)

    @classmethod
    def _load_class(cls, path: Path, device: str, name: str) -> Any:
        encoder = read_json(path / "config.json").get("encoder_type")
        try:
            return cls._load(path, device, name)
        except UserError as error:
            if encoder != "siglip2" or not isinstance(error.__cause__, AttributeError):
                raise
            import diffusers
            import transformers

            raise UserError(
                f"{path}: an AutoencoderRAE whose encoder is siglip2 cannot be built here: diffusers "
                f"{diffusers.__version__} expects another SiglipVisionModel than that of transformers "
                f"{transformers.__version__}. Use one whose encoder is dinov2 or mae."
            ) from error

    @classmethod
    def _stored(cls, path: Path) -> tuple[LatentModel, int, int, bool]:
        """(the autoencoder's description, resolution, patch, log_variance) of a folder, read without its model."""
        files = cls.files(path)
        weights = [file for name, file in files.items() if name.endswith(".safetensors")]
        described = of_folder(read_json(files["config.json"]), weights, path)
        resolution, settings = cls._sidecar(path, "resolution"), read_json(files[SIDECAR])
        log_variance = settings.get("log_variance", False)
        if not isinstance(log_variance, bool):
            raise UserError(f"{path / SIDECAR}: 'log_variance' must be true or false, not {log_variance!r}")
        if "tokens" not in settings:
            patch = cls._sidecar(path, "patch")
        elif "patch" in settings:
            raise UserError(f"{path / SIDECAR}: give either 'patch' or 'tokens', from which the patch follows")
        else:
            patch = patch_of_tokens(cls._sidecar(path, "tokens"), described, resolution)
        _check(described, resolution, patch, log_variance)
        return described, resolution, patch, log_variance

    @classmethod
    def why_only_square(cls, path: str | Path) -> str | None:
        """As ImageTokenizer.why_only_square: an AutoencoderRAE takes one size of pictures."""
        described, *_ = cls._stored(Path(path))
        if described.side is None:
            return None
        return f"an {described.name} turns whatever it is given into {described.side} x {described.side} pixels"

    @classmethod
    def stored_size(cls, path: str | Path) -> int:
        """The size of a stored tokenizer, which is always 1. Raises UserError where a file is missing."""
        cls.files(path)
        return cls.size

    @classmethod
    def stored_latents(cls, path: str | Path) -> dict[str, Any]:
        """{"patch_width", "latent_scale", "latent_shift"} of a stored tokenizer, read without its model.

        With log-variances there is also {"log_variance": True}, and rows are twice as wide as patch_width. Classes
        other than AutoencoderKL add {"model_class"}, and where latents are standardised {"latents_mean",
        "latents_std"}, one number a channel, or 4 for FLUX.2, in the order (c p q).
        """
        described, _, patch, log_variance = cls._stored(Path(path))
        found: dict[str, Any] = {
            "patch_width": described.channels * patch**2,
            "latent_scale": described.scale,
            "latent_shift": described.shift,
        }
        if log_variance:
            found["log_variance"] = True
        if described.name != cls.model_class:  # whose entry stays as it was, so that finished shards are recognised
            found["model_class"] = described.name
            if (described.mean_Cpq != 0).any() or (described.std_Cpq != 1).any():
                found["latents_mean"] = described.mean_Cpq.ravel().tolist()
                found["latents_std"] = described.std_Cpq.ravel().tolist()
        return found

    def _settings(self) -> dict[str, int]:
        more = {"log_variance": True} if self.log_variance else {}
        return {"resolution": self.resolution, "patch": self.patch, **more}

    def encode(self, value: Image.Image) -> np.ndarray:
        """The patches of a picture, float16 (patches_per_image, patch_width), or twice as wide with log-variances. With
        shapes they are (rows, columns, ...) of the nearest shape.

        Values beyond the largest of float16 are clipped to it, up to a share of `CLIPPED`. Raises UserError where more
        exceed it, and for values that are not finite.
        """
        return self.encode_batch([value])[0]

    def encode_batch(self, values: Sequence[Image.Image]) -> list[np.ndarray]:
        """The result of `encode` for each picture. They are encoded in batches, so the last bit may differ."""
        return self._by_grid(values, self._encode)

    def _encode(self, images: Sequence[Image.Image], grid: Grid) -> np.ndarray:
        import torch

        with torch.inference_mode():
            mean, log_variance = self.latents.encode(self._model, self._pixels(images, grid))
        expected = (len(images), self.latents.channels, grid[0] * self.patch, grid[1] * self.patch)
        if tuple(mean.shape) != expected:
            raise UserError(
                f"image: the {self.latents.name} gives latents of shape {tuple(mean.shape)}, where its config.json "
                f"promises {expected}"
            )
        parts = [within_float16(self.latents.standardised(mean.float().cpu().numpy()))]
        if self.log_variance:
            assert log_variance is not None
            parts.append(self.latents.log_variance(log_variance.float().cpu().numpy()))
        return np.concatenate([patchify(part, self.patch) for part in parts], axis=2).astype(np.float16)

    def decode(self, values: np.ndarray) -> Image.Image:
        """The RGB picture of one picture's patches as `encode` gives them, float (patches_per_image, patch_width), or
        (rows, columns, patch_width) where it is not square. Log-variances after the means are ignored. Raises UserError
        for another shape, and for values that are not finite."""
        import torch

        patches = np.asarray(values, np.float32)
        grid = self._grid_given(patches.shape[:-1])
        if patches.ndim == 3:
            patches = patches.reshape(-1, patches.shape[2])
        if self.log_variance and patches.ndim == 2 and patches.shape[1] == 2 * self.patch_width:
            patches = patches[:, : self.patch_width]
        if patches.shape != (grid[0] * grid[1], self.patch_width):
            raise UserError(
                f"image: patches of shape {patches.shape} given, a picture has "
                f"({self.patches_per_image}, {self.patch_width})"
            )
        if not np.isfinite(patches).all():
            raise UserError("image: the patches hold values that are not finite")
        latents = torch.from_numpy(self.latents.original(unpatchify(patches[None], self.patch, *grid)))
        with torch.inference_mode():
            return picture(self.latents.decode(self._model, latents.to(self._model.device, self._model.dtype))[0])


def patch_of_tokens(tokens: int, described: LatentModel, resolution: int) -> int:
    """The side of the smallest patches of which a square picture has at most `tokens`. Raises UserError where there is
    none."""
    side = resolution // described.factor
    for patch in range(described.period, side + 1, described.period):
        if side % patch == 0 and (side // patch) ** 2 <= tokens:
            return patch
    raise UserError(f"image: no patch divides {side} x {side} latents into {tokens} tokens or fewer")


def within_float16(latents: np.ndarray) -> np.ndarray:
    """Latents (B, C, H, W) of pictures without values that float16 does not hold. Up to a share of `CLIPPED` of a
    picture is clipped. Raises UserError where more exceed it, and for values that are not finite."""
    limit = float(np.finfo(np.float16).max)
    largest = np.abs(latents).max()
    if largest <= limit:
        return latents
    beyond = ~(np.abs(latents) <= limit)
    if not np.isfinite(latents).all() or beyond.mean(axis=(1, 2, 3)).max() > CLIPPED:
        channels = np.flatnonzero(beyond.any(axis=(0, 2, 3))).tolist()
        raise UserError(
            f"image: the autoencoder gives a latent of magnitude {largest}, which float16 does not hold, in "
            f"{int(beyond.sum()):,} of {beyond.size:,} values (channels {', '.join(map(str, channels[:8]))})"
        )
    return np.clip(latents, -limit, limit)


def _check(described: LatentModel, resolution: int, patch: int, log_variance: bool) -> None:
    """Raises UserError where an autoencoder cannot be used in this way."""
    if resolution < described.factor or resolution % described.factor:
        raise UserError(f"image: resolution {resolution} is no multiple of the model's factor {described.factor}")
    side = resolution // described.factor
    if described.side is not None and resolution != described.side:
        raise UserError(
            f"image: resolution {resolution}, but this {described.name} makes pictures of {described.side} x "
            f"{described.side} pixels and no others"
        )
    if side % patch or patch % described.period:
        parts = f"patches of {patch}" + (f" (a multiple of {described.period})" if described.period > 1 else "")
        raise UserError(f"image: {side} x {side} latents do not divide into {parts}")
    if log_variance and not described.has_variance:
        raise UserError(f"image: log_variance is true, but a {described.name} gives no variance")


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
