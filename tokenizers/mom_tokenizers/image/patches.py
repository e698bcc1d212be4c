"""The tokenizer of kind "patches", which `mom train-tokenizers` trains by default.

Its folder holds config.json, model.safetensors and image_tokenizer.json. patch_network.py has the model and the reason
why a decoded picture always has the codes that it was decoded from.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mom_tokenizers.image.autoencoder import VQImageTokenizer

if TYPE_CHECKING:
    import torch


class PatchImageTokenizer(VQImageTokenizer):
    """One code for each square of `patch` x `patch` pixels: the nearest of a codebook of such squares. The codes of a
    picture are the same to the last bit alone and in any batch."""

    kind = "patches"
    library = "mom_tokenizers"
    model_class = "PatchAutoencoder"
    sidecar_example = '{"resolution": 32}'
    size_key = ("size", 0)

    def _codebook_size(self) -> int:
        return int(self._model.size)

    @property
    def downsample(self) -> int:
        return int(self._model.patch)

    @classmethod
    def _load(cls, path: Path, device: str, name: str | None = None) -> Any:
        from mom_tokenizers.image.patch_network import PatchAutoencoder

        cls.files(path)
        return PatchAutoencoder.from_folder(path).to(device)

    def quantize(self, pixels: torch.Tensor) -> torch.Tensor:
        """As VQImageTokenizer.quantize, for pixels (B, 3, H, W) of any shape whose sides are multiples of the patch."""
        return self._model.encode(pixels).flatten(1)

    def reconstruct(self, codes: torch.Tensor) -> torch.Tensor:
        """As VQImageTokenizer.reconstruct, for codes (B, rows, columns) of any shape."""
        return self._model.decode(codes)
