"""Vocoders, which make sound of units that are no codec's: of centroids, or of the units' numbers.

A vocoder is a folder `vocoder` inside the speech tokenizer's folder, with config.json and weights. Which class it is
stands in the config as model_type. It decodes only and changes no unit, so it is no part of the tokenizer's fingerprint
and can be added to a tokenizer at any time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from mom_tokenizers.base import read_json
from mom_tokenizers.errors import UserError
from mom_tokenizers.published import load_published
from mom_tokenizers.speech.features import MEL_BANDS, MEL_HOP, SAMPLE_RATE, sound_in_windows

if TYPE_CHECKING:
    import torch

FOLDER = "vocoder"


@dataclass(frozen=True)
class Units:
    """The units that a vocoder is to make sound of."""

    extractor: str
    size: int
    width: int
    """Features of a centroid."""
    rate: int
    hop: int
    """Samples per unit, at `rate`."""
    window_seconds: float
    deduplicated: bool = False

    def __str__(self) -> str:
        return (
            f"the tokenizer's {self.size} units of '{self.extractor}' are {self.rate / self.hop:g} a second, with "
            f"{self.width} features each"
        )


class Vocoder(Protocol):
    """The interface of all vocoders."""

    rate: int
    """Samples per second of its sound."""

    def __call__(self, units_T: np.ndarray, centroids_TW: np.ndarray) -> np.ndarray:
        """The sound, float32 (samples,), of units int64 (T,) and of their centroids float32 (T, W)."""
        ...


def load_vocoder(folder: Path, units: Units, device: str = "cpu") -> Vocoder:
    """The vocoder in a folder. Raises UserError where it is none, or one for other units; then the message names
    both."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json there, so not a folder of a vocoder")
    model_type = str(read_json(folder / "config.json").get("model_type"))
    if model_type not in VOCODERS:
        known = ", ".join(VOCODERS)
        raise UserError(f"{folder}: its config.json says model_type {model_type!r}; vocoders are: {known}")
    return VOCODERS[model_type](folder, units, device)


class HifiGan:
    """transformers' SpeechT5HifiGan, which makes sound of frames of features: of the four log-mel frames of each unit,
    or of each unit's centroid. Frames that are longer than the vocoder's are repeated."""

    def __init__(self, folder: Path, units: Units, device: str):
        self.model = load_published(folder, "transformers", "SpeechT5HifiGan", weights_only=True).float().to(device)
        config = self.model.config
        self.rate, self._units, self._width = config.sampling_rate, units, config.model_in_dim
        mine = f"{folder}: a vocoder of {self._width} features every {math.prod(config.upsample_rates)} samples at"
        refused = f"{mine} {self.rate} Hz; {units}"
        for kernel, rate in zip(config.upsample_kernel_sizes, config.upsample_rates, strict=True):
            if (kernel - rate) % 2:
                raise UserError(f"{folder}: kernel {kernel} at rate {rate} differ by an odd number: sound would drift")
        frames = units.width // MEL_BANDS if units.extractor == "log_mel" and self._width == MEL_BANDS else 1
        if self._width * frames != units.width:
            raise UserError(refused)
        self._repeats = _whole(units.hop * self.rate, units.rate * frames * math.prod(config.upsample_rates), refused)
        self._hop = frames * self._repeats * math.prod(config.upsample_rates)

    def __call__(self, units_T: np.ndarray, centroids_TW: np.ndarray) -> np.ndarray:
        import torch

        def part(start: int, stop: int) -> np.ndarray:
            frames = centroids_TW[start:stop].reshape(-1, self._width).repeat(self._repeats, axis=0)
            with torch.inference_mode():
                return self.model(torch.from_numpy(frames).to(self.model.device)).cpu().numpy()

        return _in_windows(part, len(units_T), self._hop, self.rate, self._units)


class CodeHifiGan:
    """The unit vocoder of SeamlessM4T, which makes sound of the units' numbers, with its first speaker and language.

    Units that were not deduplicated last as long as the tokenizer says; of deduplicated ones it predicts durations.
    """

    CLASSES: ClassVar[dict[str, str]] = {
        "seamless_m4t": "SeamlessM4TCodeHifiGan",
        "seamless_m4t_v2": "SeamlessM4Tv2CodeHifiGan",
    }

    def __init__(self, folder: Path, units: Units, device: str):
        family = str(read_json(folder / "config.json")["model_type"])
        library = f"transformers.models.{family}.modeling_{family}"
        model = load_published(folder, library, self.CLASSES[family], weights_only=True)
        self.model = model.float().to(device)
        config = self.model.config
        self.rate, self._units = config.sampling_rate, units
        frame = math.prod(config.upsample_rates)
        refused = (
            f"{folder}: a vocoder of {config.unit_hifi_gan_vocab_size} units, of which {self.rate / frame:g} take a "
            f"second; {units}"
        )
        if config.unit_hifi_gan_vocab_size != units.size:
            raise UserError(refused)
        self._repeats = _whole(units.hop * self.rate, units.rate * frame, refused)
        self._hop = frame * self._repeats

    def __call__(self, units_T: np.ndarray, centroids_TW: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            units_1T = torch.from_numpy(units_T)[None].to(self.model.device)
            if not self._units.deduplicated:
                durations_T = torch.full_like(units_1T[0], self._repeats)
            else:
                logs_T = self.model.dur_predictor(self.model.unit_embedding(units_1T))[0]
                durations_T = torch.round(torch.expm1(logs_T)).long().clamp_min(1)
            frames_1F = units_1T.repeat_interleave(durations_T, dim=1)

        def part(start: int, stop: int) -> np.ndarray:
            with torch.inference_mode():
                return self._sound(frames_1F[:, start * each : stop * each]).cpu().numpy()

        # A window is of whole units, or of whole frames where units have several lengths.
        each = 1 if self._units.deduplicated else self._repeats
        return _in_windows(part, frames_1F.shape[1] // each, self._hop // self._repeats * each, self.rate, self._units)

    def _sound(self, frames_1F: torch.Tensor) -> torch.Tensor:
        """Sound (samples,) of a unit for each frame."""
        import torch

        zero, model = frames_1F.new_zeros(1, 1), self.model
        parts = model.language_embedding(zero), model.unit_embedding(frames_1F), model.speaker_embedding(zero)
        joined = [part.transpose(1, 2).expand(-1, -1, frames_1F.shape[1]) for part in parts]
        return model.hifi_gan(torch.cat(joined, dim=1)).flatten()


class TrainedVocoder:
    """The vocoder that train_tokenizers.py trains (see inverse_stft.py)."""

    def __init__(self, folder: Path, units: Units, device: str):
        from mom_tokenizers.speech.inverse_stft import load

        self.model = load(folder).to(device)
        self.rate, self._units = SAMPLE_RATE, units
        shape = self.model.shape
        if (shape.extractor, shape.width, shape.repeats) != frames_of(units):
            raise UserError(
                f"{folder}: a vocoder of units of '{shape.extractor}' with {shape.width} features that last "
                f"{10 * shape.repeats} ms; {units}"
            )

    def __call__(self, units_T: np.ndarray, centroids_TW: np.ndarray) -> np.ndarray:
        import torch

        shape = self.model.shape
        frames_TW = centroids_TW.reshape(-1, shape.width).repeat(shape.repeats, axis=0)

        def part(start: int, stop: int) -> np.ndarray:
            with torch.inference_mode():
                frames_1TW = torch.from_numpy(frames_TW[None, start:stop]).to(self.model.mean.device)
                return self.model(frames_1TW)[0].cpu().numpy()

        return np.clip(_in_windows(part, len(frames_TW), MEL_HOP, SAMPLE_RATE, self._units), -1, 1)


def frames_of(units: Units) -> tuple[str, int, int]:
    """(extractor, features, frames of 10 ms that they last) of what the trained vocoder reads of these units."""
    per_unit = units.hop * SAMPLE_RATE // (units.rate * MEL_HOP)
    return (units.extractor, MEL_BANDS, 1) if units.extractor == "log_mel" else (units.extractor, units.width, per_unit)


def _whole(numerator: int, denominator: int, refused: str) -> int:
    if not numerator or numerator % denominator:
        raise UserError(refused)
    return numerator // denominator


def _in_windows(part: Any, units: int, hop: int, rate: int, of: Units) -> np.ndarray:
    return sound_in_windows(part, units, hop, rate, rate / hop, of.window_seconds)


VOCODERS: dict[str, Any] = {
    "speecht5_hifigan": HifiGan,
    "hifigan": HifiGan,  # as earlier versions of transformers wrote it
    "seamless_m4t": CodeHifiGan,
    "seamless_m4t_v2": CodeHifiGan,
    "mom_inverse_stft": TrainedVocoder,
}
