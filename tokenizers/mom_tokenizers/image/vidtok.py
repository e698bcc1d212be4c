"""The tokenizer of VidTok with finite scalar quantisation (FSQ), whose model is diffusers' `AutoencoderVidTok`.

FSQ has no learnt codebook: each of the `z_channels` numbers of a latent is bounded and rounded to one of 8 levels, and
the code is the number that these digits make (Mentzer et al., arXiv 2309.15505). A tokenizer's folder is written by
`save_pretrained` of the model, and holds image_tokenizer.json as well. Lookup-free quantisation (LFQ) has no class in
diffusers or Transformers, so it is not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mom_tokenizers.errors import UserError
from mom_tokenizers.image.autoencoder import VQImageTokenizer

if TYPE_CHECKING:
    import torch


class VidTokImageTokenizer(VQImageTokenizer):
    """VidTok's codes of single pictures. A picture is taken for a video that shows it for as many frames as make one
    time step of latents, because the model cannot read fewer."""

    kind = "vidtok"
    model_class = "AutoencoderVidTok"
    size_key = ("codebook_size", 262144)
    sidecar_example = '{"resolution": 256}'

    def __init__(self, model: Any, resolution: int, source: Path | None = None):
        if model.config.regularizer != "fsq" or not model.config.is_causal:
            raise UserError(
                f"{source or 'vidtok'}: this AutoencoderVidTok has regularizer {model.config.regularizer!r} and "
                f"is_causal {model.config.is_causal}. Kind vidtok reads regularizer 'fsq' with is_causal true: a KL "
                "regularizer makes no codes, and a model that is not causal cannot decode a single picture"
            )
        super().__init__(model, resolution, source)

    @property
    def downsample(self) -> int:
        return 2 ** len(self._model.encoder.spatial_ds)

    def quantize(self, pixels: torch.Tensor) -> torch.Tensor:
        """As VQImageTokenizer.quantize."""
        frames = self._model.temporal_compression_ratio
        video_BCTHW = pixels[:, :, None].expand(-1, -1, frames, -1, -1)
        return self._model.encode(video_BCTHW)[1].flatten(1).long()

    def reconstruct(self, codes: torch.Tensor) -> torch.Tensor:
        """As VQImageTokenizer.reconstruct."""
        return self._model.decode(codes[:, None], decode_from_indices=True)[:, :, 0]
