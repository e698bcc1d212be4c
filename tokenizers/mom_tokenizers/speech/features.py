"""The features from which speech units are made: log-mel bands, or hidden states of published models. This module also
makes sound of log-mel bands.

An extractor is called with clips (float32 mono at its `sample_rate`, each with a whole number of units) and yields
(clip, first unit, features of the units from there on), in any order. Long clips go through a model in overlapping
windows, so that the memory does not grow with their length.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from mom_tokenizers.base import read_json
from mom_tokenizers.errors import UserError
from mom_tokenizers.published import load_published

if TYPE_CHECKING:
    import torch

SAMPLE_RATE = 16_000
UNITS_PER_SECOND = 25
HOP = SAMPLE_RATE // UNITS_PER_SECOND
MEL_BANDS, MEL_HOP, MEL_WINDOW, MEL_FFT = 40, 160, 400, 512
FRAMES_PER_UNIT = HOP // MEL_HOP
# model_type in config.json -> the class in transformers, and its attention. They are named here so that no folder can
# name code to run.
MODELS = {
    "hubert": ("HubertModel", "sdpa"),
    "wav2vec2": ("Wav2Vec2Model", "sdpa"),
    "wavlm": ("WavLMModel", "eager"),
    "data2vec-audio": ("Data2VecAudioModel", "sdpa"),
}
WINDOW_SECONDS = 30.0
CONTEXT_SECONDS = 2.0  # the model also hears this much on either side of the part of a window that is kept
FADE_SECONDS = 0.01  # half of the time in which the sound of one window gives way to that of the next
SECONDS_AT_ONCE = 120  # the most seconds of sound in one forward pass

Piece = tuple[int, int, np.ndarray]


class Extractor(Protocol):
    """The interface of all extractors. A unit takes `hop` samples and has `width` features."""

    sample_rate: int
    hop: int
    width: int

    def __call__(self, clips: Sequence[np.ndarray], /) -> Iterator[Piece]: ...


class LogMel:
    """The extractor of log-mel features, float32 (units, 160): for each unit 4 frames of 40 log-mel bands, 10 ms apart,
    from which the clip's mean is subtracted."""

    sample_rate, hop, width = SAMPLE_RATE, HOP, FRAMES_PER_UNIT * MEL_BANDS

    def __call__(self, clips: Sequence[np.ndarray]) -> Iterator[Piece]:
        for clip, samples in enumerate(clips):
            bands = log_mel(samples)
            yield clip, 0, (bands - mean_bands(bands)).reshape(-1, self.width)


@lru_cache(maxsize=1)
def mel_filters() -> np.ndarray:
    """The filters that sum the power of 257 frequencies into 40 mel bands, float32 (257, 40)."""
    from transformers.audio_utils import mel_filter_bank

    return mel_filter_bank(
        MEL_FFT // 2 + 1, MEL_BANDS, 20.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    ).astype(np.float32)


def log_mel(samples: np.ndarray, block: int = 6_000) -> np.ndarray:
    """The log10 of the power in mel bands, float32 (frames, 40), with a frame every 10 ms of sound at 16 kHz. `block`
    frames are computed at a time."""
    around = (MEL_WINDOW - MEL_HOP) // 2
    window = np.hanning(MEL_WINDOW).astype(np.float32)
    mel = np.empty((len(samples) // MEL_HOP, MEL_BANDS), np.float32)
    for start in range(0, len(mel), block):
        stop = min(start + block, len(mel))
        left, right = start * MEL_HOP - around, stop * MEL_HOP + around
        heard = np.pad(samples[max(0, left) : right], (max(0, -left), max(0, right - len(samples))))
        frames = np.lib.stride_tricks.sliding_window_view(heard, MEL_WINDOW)[::MEL_HOP]
        mel[start:stop] = (np.abs(np.fft.rfft(frames * window, MEL_FFT)) ** 2).astype(np.float32) @ mel_filters()
    # Everything that is 80 dB or more below the clip's peak counts as silence.
    return np.log10(np.maximum(mel, max(float(mel.max()) * 1e-8, 1e-10)))


def mean_bands(bands: np.ndarray) -> np.ndarray:
    """The mean over frames, float32 (40,). It is summed in float64, because an hour has 360,000 frames."""
    return bands.mean(axis=0, dtype=np.float64).astype(np.float32)


def sound_of_log_mel(bands: np.ndarray, iterations: int = 30, seed: int = 0) -> np.ndarray:
    """Sound at 16 kHz with peak 0.5, float32 (160 * frames,), whose log_mel() is near `bands` (frames, 40) up to its
    loudness.

    The linear power is computed from mel bands by Richardson-Lucy iterations, which keep it positive. The phases are
    found from random ones by Griffin-Lim iterations with momentum (Perraudin et al. 2013).
    """
    import torch

    mel_TM = torch.from_numpy(10 ** (bands - bands.max()).astype(np.float32)).clamp_min(1e-8)
    filters_FM = torch.from_numpy(mel_filters())
    power_TF = torch.full((len(bands), len(filters_FM)), float(mel_TM.mean()))
    for _ in range(100):
        ratio_TM = mel_TM / (power_TF @ filters_FM).clamp_min(1e-12)
        power_TF *= (ratio_TM @ filters_FM.T) / filters_FM.sum(1).clamp_min(1e-6)
    magnitude_FT = power_TF.sqrt().T
    window = torch.from_numpy(np.hanning(MEL_WINDOW).astype(np.float32))
    # The frames of log_mel are centred half a hop later than torch's, so the sound begins half a hop before torch's
    # first frame.
    length = MEL_HOP * len(bands) - MEL_HOP // 2

    def sound(spectrum_FT: torch.Tensor) -> torch.Tensor:
        return torch.istft(spectrum_FT, MEL_FFT, MEL_HOP, MEL_WINDOW, window, length=length)

    def spectrum(samples: torch.Tensor) -> torch.Tensor:
        stft = torch.stft(samples, MEL_FFT, MEL_HOP, MEL_WINDOW, window, pad_mode="constant", return_complex=True)
        return stft[:, : len(bands)]

    phase_FT = 2 * math.pi * torch.rand(magnitude_FT.shape, generator=torch.Generator().manual_seed(seed))
    guess_FT = torch.polar(magnitude_FT, phase_FT)
    before_FT = torch.zeros_like(guess_FT)
    for _ in range(iterations):
        consistent_FT = spectrum(sound(guess_FT))
        momentum_FT = consistent_FT + 0.99 * (consistent_FT - before_FT)
        guess_FT = magnitude_FT * momentum_FT / momentum_FT.abs().clamp_min(1e-12)
        before_FT = consistent_FT
    samples = np.concatenate([np.zeros(MEL_HOP // 2, np.float32), sound(guess_FT).numpy()])
    return 0.5 * samples / max(float(np.abs(samples).max()), 1e-9)


class Window(NamedTuple):
    """A window of a clip, in units: the model hears [start, stop), of which [first, last) is kept."""

    clip: int
    start: int
    stop: int
    first: int
    last: int


def windows(clip: int, units: int, window: int, context: int) -> list[Window]:
    """The windows of a clip: a single one for up to `window` units, otherwise overlapping windows of that length, of
    which each unit is kept once."""
    if units <= window:
        return [Window(clip, 0, units, 0, units)]
    starts = [*range(0, units - window, window - 2 * context), units - window]
    kept = [0, *(start + context for start in starts[1:]), units]
    return [Window(clip, s, s + window, kept[k], kept[k + 1]) for k, s in enumerate(starts)]


def sound_in_windows(
    decode: Callable[[int, int], np.ndarray], units: int, hop: int, rate: int, per_second: float, seconds: float
) -> np.ndarray:
    """The sound of `units` units, float32 (units * hop,), where `decode(start, stop)` gives that of some of them.

    More than `seconds` of units are decoded in overlapping windows. Where two meet, both sound alike as far as the
    decoder's receptive field ends within the overlap; over 20 ms the one gives way to the other, so that nothing clicks
    where it does not.
    """
    whole = np.zeros(units * hop, np.float32)
    half = min(hop // 2, round(FADE_SECONDS * rate))
    ramp = (np.arange(2 * half, dtype=np.float32) + 0.5) / (2 * half)
    for w in windows(0, units, round(seconds * per_second), round(CONTEXT_SECONDS * per_second)):
        part = decode(w.start, w.stop)
        low = w.first * hop - half if w.first else 0
        high = w.last * hop + half if w.last < units else units * hop
        kept = part[low - w.start * hop : high - w.start * hop].copy()
        if w.first:
            kept[: 2 * half] *= ramp
        if w.last < units:
            kept[len(kept) - 2 * half :] *= ramp[::-1]
        whole[low:high] += kept
    return whole


class PublishedModel(ABC):
    """What both kinds of published models share: their folder, windows, and batches of equal lengths.

    Clips are never padded to a common length, because an extractor with group norm would hear the padding, which
    changes features by up to 2.4.
    """

    CLASSES: ClassVar[Mapping[str, tuple[str, str | None]]] = MODELS
    sample_rate: int
    hop: int
    width = 1
    window_seconds: float
    padding = 0  # the number of zeros after the last sample that make the last unit complete
    normalize = False  # whether clips are scaled to mean 0 and deviation 1

    def __init__(self, path: Path, model_type: str, window_seconds: float, device: str):
        self.model = load_model(path, model_type, *self.CLASSES[model_type]).to(device)
        self.window_seconds = window_seconds

    @abstractmethod
    def run(self, samples_BS: torch.Tensor, beside_BTW: torch.Tensor | None) -> torch.Tensor:
        """The features (B, units, width), or codes (B, units, codebooks), of samples (B, S) and of what `beside` has
        for the same units."""

    def beside(self, samples: np.ndarray) -> np.ndarray | None:
        """What else the model reads of a whole clip, float32 (units or one more, width), or None."""
        return None

    def __call__(self, clips: Sequence[np.ndarray]) -> Iterator[Piece]:
        import torch

        per_second = self.sample_rate / self.hop
        window, context = (round(s * per_second) for s in (self.window_seconds, CONTEXT_SECONDS))
        by_length: dict[int, list[Window]] = {}
        for clip, samples in enumerate(clips):
            for w in windows(clip, len(samples) // self.hop, window, context):
                by_length.setdefault(w.stop - w.start, []).append(w)
        scales = [_mean_and_deviation(samples) if self.normalize else (0.0, 1.0) for samples in clips]
        besides = [self.beside(samples) for samples in clips]
        for length, same in by_length.items():
            at_once = max(1, int(SECONDS_AT_ONCE * per_second / length))
            for i in range(0, len(same), at_once):
                batch = same[i : i + at_once]
                heard_BS = np.zeros((len(batch), length * self.hop + self.padding), np.float32)
                for heard, w in zip(heard_BS, batch, strict=True):
                    mean, deviation = scales[w.clip]
                    part = clips[w.clip][w.start * self.hop :][: len(heard)]
                    heard[: len(part)] = (part - mean) / deviation
                read = [
                    # with one row more than units, where there is one
                    beside[w.start : w.stop + len(beside) - len(clips[w.clip]) // self.hop]
                    for w in batch
                    if (beside := besides[w.clip]) is not None
                ]
                with torch.inference_mode():
                    beside_BTW = torch.from_numpy(np.stack(read)).to(self.model.device) if read else None
                    found = self.run(torch.from_numpy(heard_BS).to(self.model.device), beside_BTW).cpu().numpy()
                for w, features in zip(batch, found, strict=True):
                    yield w.clip, w.first, features[w.first - w.start : w.last - w.start]


class HiddenStates(PublishedModel):
    """The hidden states of one layer of a HuBERT-like model, exactly 25 per second. Layer 1 is after the first
    Transformer layer.

    Where a model has 50 per second, each two are averaged.
    """

    sample_rate, hop = SAMPLE_RATE, HOP

    def __init__(self, path: Path, model_type: str, layer: int, window_seconds: float, device: str):
        super().__init__(path, model_type, window_seconds, device)
        config = self.model.config
        if not 0 <= layer <= config.num_hidden_layers:
            raise UserError(f"speech: layer {layer} of a {model_type} with {config.num_hidden_layers} layers")
        hop = math.prod(config.conv_stride)
        if hop not in (HOP, HOP // 2):
            raise UserError(
                f"{path}: its features are {SAMPLE_RATE / hop:g} a second; {UNITS_PER_SECOND} are needed, or twice that"
            )
        receptive_field = 1 + sum(
            (kernel - 1) * math.prod(config.conv_stride[:i]) for i, kernel in enumerate(config.conv_kernel)
        )
        self.padding = max(0, receptive_field - hop)
        self.layer, self.width = layer, config.hidden_size
        self._pooled = HOP // hop
        # Higher layers are not needed. One more layer is kept, because some classes normalise after the last one.
        self.model.encoder.layers = self.model.encoder.layers[: layer + 1]
        preprocessor = path / "preprocessor_config.json"
        # Where the file exists but lacks the key, transformers normalises.
        self.normalize = preprocessor.is_file() and bool(read_json(preprocessor).get("do_normalize", True))

    def run(self, samples_BS: torch.Tensor, beside_BTW: torch.Tensor | None) -> torch.Tensor:
        states_BTW = self.model(samples_BS, output_hidden_states=True).hidden_states[self.layer].float()
        return states_BTW.unflatten(1, (-1, self._pooled)).mean(2)


def _mean_and_deviation(samples: np.ndarray, block: int = 1 << 20) -> tuple[float, float]:
    """(mean, standard deviation) by which Wav2Vec2FeatureExtractor normalises, without a second copy of the clip."""
    mean = float(samples.mean(dtype=np.float64))
    squares = sum(
        float(np.square(samples[i : i + block] - mean, dtype=np.float64).sum()) for i in range(0, len(samples), block)
    )
    return mean, math.sqrt(squares / len(samples) + 1e-7)


def load_model(path: Path, model_type: str, name: str, attention: str | None) -> Any:
    """A model of transformers' class `name` from a folder. Its weights are safetensors, or a .bin file from which only
    tensors are read, never code. Raises UserError for a folder of another model."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no config.json there, so not a folder of a {model_type} model")
    found = read_json(path / "config.json").get("model_type")
    if found != model_type:
        raise UserError(f"{path}: extractor '{model_type}', but its config.json says model_type {found!r}")
    chosen = {} if attention is None else {"attn_implementation": attention}
    # Where a folder holds both kinds of weights, safetensors are read.
    return load_published(path, "transformers", name, weights_only=True, **chosen).float()
