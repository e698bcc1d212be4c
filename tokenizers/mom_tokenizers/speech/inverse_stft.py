"""A small vocoder that learns in minutes on a CPU: a network says magnitudes and phases of short-time spectra, and the
inverse transform makes sound of them (Siuzdak 2023, Vocos).

The network works at 100 frames a second and never at the rate of samples, which makes it about a hundred times cheaper
than vocoders that upsample, such as HiFi-GAN. Its blocks are ConvNeXt's (Liu et al. 2022) in one dimension.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mom_tokenizers.base import read_json
from mom_tokenizers.errors import UserError
from mom_tokenizers.speech.features import MEL_HOP, SAMPLE_RATE

MODEL_TYPE = "mom_inverse_stft"
FFT = 512
BINS = FFT // 2 + 1
QUIET, LOUDEST = 3.0, 4.0  # the logarithm of a magnitude is what the network says minus QUIET, and at most LOUDEST


@dataclass(frozen=True)
class Shape:
    """What a folder's config.json says of the vocoder."""

    extractor: str
    width: int
    """Features of a frame."""
    repeats: int
    """Frames of 10 ms for which the features of one input last: 1 for log-mel frames, 4 for centroids."""
    channels: int = 256
    blocks: int = 6


class Block(nn.Module):
    """A convolution of each channel over time, then a layer of the channels of each frame, added to what came in."""

    def __init__(self, channels: int):
        super().__init__()
        self.over_time = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.widen, self.narrow = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.3))

    def forward(self, x_BTC: Tensor) -> Tensor:
        y_BTC = self.norm(self.over_time(x_BTC.mT).mT)
        added_BTC: Tensor = self.scale * self.narrow(F.gelu(self.widen(y_BTC)))
        return x_BTC + added_BTC


class InverseSTFT(nn.Module):
    """Sound of frames of features."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        C = shape.channels
        self.first = nn.Conv1d(shape.width, C, 7, padding=3)
        self.blocks = nn.ModuleList(Block(C) for _ in range(shape.blocks))
        self.norm, self.last = nn.LayerNorm(C), nn.Linear(C, 2 * BINS)
        self.register_buffer("mean", torch.zeros(shape.width))
        self.register_buffer("deviation", torch.ones(shape.width))

    def forward(self, x_BTW: Tensor) -> Tensor:
        """Samples (B, 160 T) at 16 kHz of frames (B, T, width), one every 10 ms."""
        x_BTC = self.first(((x_BTW - self.mean) / self.deviation).mT).mT
        for block in self.blocks:
            x_BTC = block(x_BTC)
        out_BOT = self.last(self.norm(x_BTC)).mT
        # The centre of a frame of features lies between those of two frames of the transform.
        edges = F.pad(out_BOT, (1, 1), mode="replicate")
        out_BOT = 0.5 * (edges[..., 1:] + edges[..., :-1])
        magnitude_BFT = (out_BOT[:, :BINS] - QUIET).clamp(max=LOUDEST).exp()
        spectrum_BFT = torch.polar(magnitude_BFT, math.pi * out_BOT[:, BINS:])
        window = torch.hann_window(FFT, device=x_BTW.device)
        return torch.istft(spectrum_BFT, FFT, MEL_HOP, FFT, window, length=MEL_HOP * x_BTW.shape[1])


def save(model: InverseSTFT, folder: Path) -> None:
    """Write config.json and model.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": MODEL_TYPE, "sampling_rate": SAMPLE_RATE, **asdict(model.shape)}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")


def load(folder: Path) -> InverseSTFT:
    """The vocoder that `save` wrote. Raises UserError for anything else."""
    from safetensors.torch import load_file

    config: dict[str, Any] = read_json(folder / "config.json")
    try:
        model = InverseSTFT(Shape(**{field.name: config[field.name] for field in fields(Shape)}))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except Exception as error:  # missing keys and tensors, and what the library raises
        raise UserError(f"{folder}: not a vocoder that train_tokenizers.py wrote: {error}") from error
    return model.eval().requires_grad_(False)
