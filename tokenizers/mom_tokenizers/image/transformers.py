"""Codes of the image tokenizers in Transformers: Emu3's and Janus's VQ autoencoders.

A folder is what `save_pretrained` of the VQ model alone writes, with image_tokenizer.json beside it:

    model = Emu3ForConditionalGeneration.from_pretrained(...).model.vqmodel      # or Janus...
    model.save_pretrained(folder)                                                # and {"resolution": 256}

Emu3 makes a picture 8 times smaller (256 pixels: 1,024 codes), Janus 16 times (256 pixels: 256 codes, 512: 1,024).
Both read pixels in [-1, 1], as the published models do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mom_tokenizers.image.autoencoder import VQImageTokenizer

if TYPE_CHECKING:
    import torch


class Emu3ImageTokenizer(VQImageTokenizer):
    """A picture is a clip of one step of time: the model repeats it `temporal_downsample_factor` times."""

    kind = "emu3"
    library = "transformers"
    model_class = "Emu3VQVAE"
    levels_key = "channel_multiplier"
    size_key = ("codebook_size", 32768)
    sidecar_example = '{"resolution": 256}'

    def quantize(self, pixels: torch.Tensor) -> torch.Tensor:
        """As VQImageTokenizer.quantize."""
        import torch

        sizes = torch.tensor([pixels.shape[2:]] * len(pixels))
        return torch.stack(self._model.encode(pixels, sizes).image_tokens).flatten(1)

    def reconstruct(self, codes: torch.Tensor) -> torch.Tensor:
        """As VQImageTokenizer.reconstruct."""
        return self._model.decode(codes)


class JanusImageTokenizer(VQImageTokenizer):
    """Nearest by angle: latents and codebook are compared at unit length.

    Janus was trained so, and Transformers' `decode` normalises the codebook, but its `encode` normalises neither side:
    where the codebook is not of unit length, its codes are others. Hence the search here.
    """

    kind = "janus"
    library = "transformers"
    model_class = "JanusVQVAE"
    levels_key = "channel_multiplier"
    size_key = ("num_embeddings", 16384)
    sidecar_example = '{"resolution": 512}'

    def quantize(self, pixels: torch.Tensor) -> torch.Tensor:
        """As VQImageTokenizer.quantize."""
        from torch.nn.functional import normalize

        latents_BDHW = normalize(self._model.quant_conv(self._model.encoder(pixels)), dim=1)
        codebook_VD = normalize(self._model.quantize.embedding.weight, dim=1)
        # of unit vectors, the nearest has the largest product
        return (latents_BDHW.flatten(2).transpose(1, 2) @ codebook_VD.T).argmax(-1)

    def reconstruct(self, codes: torch.Tensor) -> torch.Tensor:
        """As VQImageTokenizer.reconstruct; of any size, not only the config's `num_patches`."""
        from torch.nn.functional import normalize

        latents_BHWD = normalize(self._model.quantize.embedding(codes), dim=-1)
        return self._model.decoder(self._model.post_quant_conv(latents_BHWD.permute(0, 3, 1, 2).contiguous()))
