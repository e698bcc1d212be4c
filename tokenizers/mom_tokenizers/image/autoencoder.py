"""What all image tokenizers share, and the tokenizer that makes codes with any `diffusers.VQModel`.

An image tokenizer is an autoencoder's folder with an `image_tokenizer.json` beside the weights. patches.py has the
small one that is trained here, transformers.py the codes of Emu3 and Janus, vidtok.py those of VidTok, and kl.py the
latents of an `AutoencoderKL`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mom_tokenizers.base import fingerprint_files, read_json
from mom_tokenizers.errors import UserError
from mom_tokenizers.media.pictures import decode_image as decode_image  # exported for users of this module
from mom_tokenizers.media.pictures import on_white
from mom_tokenizers.media.shapes import Grid, Shapes
from mom_tokenizers.published import load_published

if TYPE_CHECKING:
    import torch
    from PIL import Image

SIDECAR = "image_tokenizer.json"
BATCH_PIXELS = 32 * 256 * 256  # the most pixels encoded at once: 32 pictures of 256 x 256, or 8 of 512 x 512


def preprocess(image: Image.Image, resolution: int) -> np.ndarray:
    """The pixels of a picture as a model reads them, float32 (3, resolution, resolution) in [-1, 1]. Transparent parts
    are put on white, the shorter side is resized to `resolution`, and the centre square is taken."""
    return fitted(image, resolution, resolution)


def fitted(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The pixels of a picture in a given shape, float32 (3, height, width) in [-1, 1]. Transparent parts are put on
    white, and the picture is resized until it just covers the shape, of which the middle is taken."""
    from PIL import Image  # late, because describing a tokenizer does not need it

    image = on_white(image)
    scale = max(height / image.height, width / image.width)
    # The size of the whole picture after resizing, of which one side is that of the shape and the other as long or
    # longer.
    whole_width, whole_height = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    # Only the middle is resized, because resizing the whole of a very long picture would take much memory.
    left, top = (whole_width - width) // 2, (whole_height - height) // 2
    box_scale = (image.width / whole_width, image.height / whole_height)
    box = (
        left * box_scale[0],
        top * box_scale[1],
        (left + width) * box_scale[0],
        (top + height) * box_scale[1],
    )
    middle = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(middle, np.float32).transpose(2, 0, 1) / 127.5 - 1


def picture(pixels: torch.Tensor) -> Image.Image:
    """The RGB picture of pixels (3, H, W) in [-1, 1]. Values outside are clipped."""
    import torch
    from PIL import Image

    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(array.transpose(1, 2, 0))


class ImageTokenizer:
    """What all image tokenizers share: an autoencoder, a resolution, and the folder from which they are loaded."""

    kind: ClassVar[str]
    library: ClassVar[str] = "diffusers"
    model_class: ClassVar[str]
    """The name of the model's class in the library."""
    levels_key: ClassVar[str] = "block_out_channels"
    """The key of the model's config that has one entry per level. Each level has half the side of the one before."""
    sidecar_example: ClassVar[str]
    """An example of image_tokenizer.json, for error messages."""
    setting_keys: ClassVar[tuple[str, ...]] = ("resolution",)
    """The keys that image_tokenizer.json may have."""
    why_square: ClassVar[str | None] = None
    """Why this kind makes square pictures only, or None where its model takes any shape."""
    shapes: Shapes | None = None
    """The shapes of pictures, which `use_shapes` sets. None makes every picture square."""

    # `model` is Any because mypy cannot follow the classes of diffusers and Transformers.
    def __init__(self, model: Any, resolution: int, source: Path | None = None):
        self._model = model.eval().requires_grad_(False)
        self._source = source  # the folder it was loaded from; save() copies it, so that the fingerprint stays the same
        self.resolution = resolution
        self._batch = max(1, min(32, BATCH_PIXELS // resolution**2))
        if resolution < self.downsample or resolution % self.downsample:
            raise UserError(f"image: resolution {resolution} is no multiple of the model's factor {self.downsample}")

    @property
    def downsample(self) -> int:
        """The number of pixels, along a side, for which there is one code or latent."""
        return 2 ** (len(getattr(self._model.config, self.levels_key)) - 1)

    @classmethod
    def _load(cls, path: Path, device: str, name: str | None = None) -> Any:
        # With low_cpu_mem_usage, diffusers would silently leave missing weights on the meta device.
        options = {"low_cpu_mem_usage": False} if cls.library == "diffusers" else {}
        # Only safetensors are read, because a pickled checkpoint could run code.
        model = load_published(path, cls.library, name or cls.model_class, use_safetensors=True, **options)
        return model.to(device)

    @classmethod
    def _sidecar(cls, path: Path, key: str) -> int:
        settings = read_json(cls.files(path)[SIDECAR])
        if unknown := set(settings) - set(cls.setting_keys):
            raise UserError(f"{path / SIDECAR}: unknown {sorted(unknown)}; known: {', '.join(cls.setting_keys)}")
        value = settings.get(key)
        if type(value) is not int or value < 1:  # true would be 1
            raise UserError(f"{path / SIDECAR}: '{key}' must be a number of pixels, e.g. {cls.sidecar_example}")
        return value

    @classmethod
    def files(cls, path: str | Path) -> dict[str, Path]:
        """The path of every file of the tokenizer by its name. Raises UserError where one is missing."""
        path = Path(path)
        for name, remedy in (
            ("config.json", f"expected a {cls.library} {cls.model_class} folder"),
            (SIDECAR, f"write one beside config.json, e.g. {cls.sidecar_example}"),
        ):
            if not (path / name).is_file():
                raise UserError(f"{path}: no {name} there; {remedy}")
        weights = sorted(path.glob("*.safetensors"))
        if not weights:
            raise UserError(f"{path}: no .safetensors weights there (pickled checkpoints are not loaded)")
        return {file.name: file for file in (path / "config.json", path / SIDECAR, *weights)}

    @property
    def _factor(self) -> int:
        """The side in pixels of what one token shows."""
        return self.downsample

    @property
    def grid(self) -> Grid:
        """(rows, columns) of the tokens of a square picture."""
        side = self.resolution // self._factor
        return side, side

    def pixels_of(self, grid: Grid | None) -> tuple[int, int]:
        """(height, width) in pixels of a picture of this grid, None for a square one."""
        rows, columns = grid or self.grid
        return rows * self._factor, columns * self._factor

    @classmethod
    def why_only_square(cls, path: str | Path) -> str | None:
        """Why the tokenizer stored at `path` makes square pictures only, or None where it takes any shape."""
        return cls.why_square

    def use_shapes(self, shapes: Shapes) -> None:
        """From now on give each picture the nearest of these shapes, and not the square one. Raises UserError where the
        model makes another number of tokens of a square picture."""
        if shapes.square != self.grid:
            made = self.grid[0] ** 2
            raise UserError(
                f"image: shapes: tokens is {shapes.tokens}, but this tokenizer makes {made} of a square picture of "
                f"{self.resolution} pixels; set tokens to {made}"
            )
        self.shapes = shapes

    def grid_of(self, image: Image.Image) -> Grid:
        """The (rows, columns) of tokens that a picture becomes."""
        return self.grid if self.shapes is None else self.shapes.nearest(image.width, image.height)

    def _by_grid(
        self, images: Sequence[Image.Image], encode: Callable[[Sequence[Image.Image], Grid], np.ndarray]
    ) -> list[np.ndarray]:
        """What `encode` makes of each picture, in the order of `images`. It gets pictures of one grid at a time, in
        batches. With shapes, the axis of tokens becomes two: rows and columns."""
        found: dict[Grid, list[int]] = {}
        for i, image in enumerate(images):
            found.setdefault(self.grid_of(image), []).append(i)
        encoded: dict[int, np.ndarray] = {}
        for grid, members in found.items():
            for start in range(0, len(members), self._batch):
                batch = members[start : start + self._batch]
                for i, values in zip(batch, encode([images[i] for i in batch], grid), strict=True):
                    encoded[i] = values if self.shapes is None else values.reshape(*grid, *values.shape[1:])
        return [encoded[i] for i in range(len(images))]

    def _grid_given(self, shape: tuple[int, ...]) -> Grid:
        """The grid of values of one picture, whose axes of tokens are `shape`. Raises UserError for a grid that the
        tokenizer does not make."""
        if len(shape) != 2:
            return self.grid
        grid = shape[0], shape[1]
        if grid != self.grid and (self.shapes is None or grid not in self.shapes.grids):
            known = "square pictures alone" if self.shapes is None else f"pictures of {self.shapes}"
            raise UserError(f"image: {grid[0]} rows of {grid[1]} columns given, and this tokenizer makes {known}")
        return grid

    def _settings(self) -> dict[str, int]:
        """The contents of image_tokenizer.json."""
        return {"resolution": self.resolution}

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._source is None:
            self._model.save_pretrained(str(directory))
            (directory / SIDECAR).write_text(json.dumps(self._settings()) + "\n")
        elif self._source.resolve() != directory.resolve():
            for file in self.files(self._source).values():
                shutil.copyfile(file, directory / file.name)

    def fingerprint(self) -> str:
        """16 hexadecimal digits, which are the same after save and load, and on every machine."""
        if self._source is not None:
            return fingerprint_files(self.kind, self.files(self._source))
        with TemporaryDirectory() as directory:
            self.save(directory)
            return fingerprint_files(self.kind, self.files(directory))

    def _pixels(self, images: Sequence[Image.Image], grid: Grid) -> torch.Tensor:
        import torch

        size = self.pixels_of(grid)
        pixels = torch.from_numpy(np.stack([fitted(image, *size) for image in images]))
        return pixels.to(self._model.device, self._model.dtype)


class VQImageTokenizer(ImageTokenizer):
    """Encodes a PIL picture as (resolution / downsample)^2 codes in raster order, and decodes codes to a picture. With
    `shapes`, a picture is rows x columns codes of the nearest shape."""

    kind = "vq"
    model_class = "VQModel"
    sidecar_example = '{"resolution": 512}'
    size_key: ClassVar[tuple[str, int]] = ("num_vq_embeddings", 256)
    """The key of the model's config that holds the number of codes, and the number where a stored config lacks it."""

    def __init__(self, model: Any, resolution: int, source: Path | None = None):
        super().__init__(model, resolution, source)
        self.size = self._codebook_size()

    def _codebook_size(self) -> int:
        return int(getattr(self._model.config, self.size_key[0]))

    @property
    def codes_per_image(self) -> int:
        return (self.resolution // self.downsample) ** 2

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> VQImageTokenizer:
        """Load a folder that `save_pretrained` of the model wrote and that also holds image_tokenizer.json. Raises
        UserError where it is not such a folder."""
        path = Path(path)
        resolution = cls._sidecar(path, "resolution")
        return cls(cls._load(path, device), resolution, path)

    @classmethod
    def stored_size(cls, path: str | Path) -> int:
        """The number of codes of a stored tokenizer, read from its config alone."""
        return int(read_json(cls.files(path)["config.json"]).get(*cls.size_key))

    def encode(self, value: Image.Image) -> np.ndarray:
        """The codes of a picture in raster order, uint32 (codes_per_image,), or (rows, columns) with shapes."""
        return self.encode_batch([value])[0]

    def encode_batch(self, values: Sequence[Image.Image]) -> list[np.ndarray]:
        """The result of `encode` for each picture. They are encoded in batches, so a code may differ where two are
        equally near up to rounding."""
        return self._by_grid(values, self._encode)

    def _encode(self, images: Sequence[Image.Image], grid: Grid) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.quantize(self._pixels(images, grid)).cpu().numpy().astype(np.uint32)

    def quantize(self, pixels: torch.Tensor) -> torch.Tensor:
        """The codes, int64 (B, codes of a picture), of pixels (B, 3, height, width) in [-1, 1]."""
        # In diffusers, encode() does not call the quantiser.
        codes = self._model.quantize(self._model.encode(pixels).latents)[2][2]
        return codes.view(pixels.shape[0], -1)

    def decode(self, ids: Sequence[int] | np.ndarray) -> Image.Image:
        """The RGB picture of one picture's codes: (codes_per_image,) for a square one, (rows, columns) for any other.
        Raises UserError for a wrong number of codes, one out of range, or a shape that the tokenizer does not make."""
        import torch

        codes = np.asarray(ids, np.int64)
        grid = self._grid_given(codes.shape)
        if codes.size != grid[0] * grid[1]:
            raise UserError(f"image: {codes.size} codes given, a picture has {self.codes_per_image}")
        if codes.min() < 0 or codes.max() >= self.size:
            raise UserError(f"image: code {codes.min()} or {codes.max()} lies outside the codebook of {self.size}")
        with torch.inference_mode():
            return picture(self.reconstruct(torch.from_numpy(codes).view(1, *grid).to(self._model.device))[0])

    def reconstruct(self, codes: torch.Tensor) -> torch.Tensor:
        """The pixels (B, 3, height, width), in about [-1, 1], of codes int64 (B, rows, columns)."""
        config: Any = self._model.config
        shape = (*codes.shape, config.vq_embed_dim or config.latent_channels)
        quantized = self._model.quantize.get_codebook_entry(codes.flatten(), shape)
        # The decoder is called directly, because diffusers' decode() may look the vectors up a second time.
        return self._model.decoder(
            self._model.post_quant_conv(quantized), quantized if config.norm_type == "spatial" else None
        )
