"""The image tokenizers of Emu3 and Janus, whose VQ autoencoders are in the library Transformers.

A tokenizer's folder is written by `save_pretrained` of the VQ model alone, and holds image_tokenizer.json as well:

    model = Emu3ForConditionalGeneration.from_pretrained(...).model.vqmodel      # or Janus...
    model.save_pretrained(folder)                                                # and {"resolution": 256}

Emu3 has one code for 8 x 8 pixels (a picture of 256 x 256 has 1,024 codes), and Janus one for 16 x 16 (256 codes for
256 x 256, and 1,024 for 512 x 512). Both read pixels in [-1, 1], as the published models do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mom_tokenizers.image.autoencoder import VQImageTokenizer

if TYPE_CHECKING:
    import torch


class Emu3ImageTokenizer(VQImageTokenizer):
    """Emu3's tokenizer. It takes a picture for a video of one time step, and the model repeats it
    `temporal_downsample_factor` times."""

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
    """Janus's tokenizer. The code of a latent is the vector of the codebook nearest by angle.

    Janus was trained like this, and Transformers' `decode` normalises the codebook. But its `encode` normalises neither
    latents nor codebook, and gives other codes where the codebook's vectors are not of unit length. So this class does
    the search itself.
    """

    kind = "janus"
    library = "transformers"
    model_class = "JanusVQVAE"
    levels_key = "channel_multiplier"
    size_key = ("num_embeddings", 16384)
    sidecar_example = '{"resolution": 512}'
    why_square = "Janus was trained on squares of one size, and its decoder knows the number of patches of no other"

    def quantize(self, pixels: torch.Tensor) -> torch.Tensor:
        """As VQImageTokenizer.quantize."""
        from torch.nn.functional import normalize

        latents_BDHW = normalize(self._model.quant_conv(self._model.encoder(pixels)), dim=1)
        codebook_VD = normalize(self._model.quantize.embedding.weight, dim=1)
        # Among unit vectors, the nearest one has the largest product.
        return (latents_BDHW.flatten(2).transpose(1, 2) @ codebook_VD.T).argmax(-1)

    def reconstruct(self, codes: torch.Tensor) -> torch.Tensor:
        """Does the same as VQImageTokenizer.reconstruct, for any size, not only the config's `num_patches`."""
        from torch.nn.functional import normalize

        latents_BHWD = normalize(self._model.quantize.embedding(codes), dim=-1)
        return self._model.decoder(self._model.post_quant_conv(latents_BHWD.permute(0, 3, 1, 2).contiguous()))
