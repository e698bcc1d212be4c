"""Codecs of transformers, which make codes of recordings and sound of codes: Mimi, NeuCodec, X-codec 2 and DAC.

A codec is an extractor (see features.py) whose features are codes, int64 (units, codebooks). The first codebook alone,
or several, serve as units; `units.py` writes several as one row of ids.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mom_tokenizers.errors import UserError
from mom_tokenizers.speech.features import (
    CONTEXT_SECONDS,
    MODELS,
    WINDOW_SECONDS,
    Extractor,
    HiddenStates,
    LogMel,
    PublishedModel,
    sound_in_windows,
)

if TYPE_CHECKING:
    import torch

# model_type in config.json -> the class in transformers, and its attention, as in features.py
CODECS = {
    "mimi": ("MimiModel", "sdpa"),
    "neucodec": ("NeuCodecModel", "sdpa"),
    "xcodec2": ("Xcodec2Model", "sdpa"),
    "dac": ("DacModel", None),
}
EXTRACTORS = ("log_mel", *MODELS, *CODECS)


class Codec(PublishedModel):
    """A codec, of whose codebooks the first `codebooks` are used, each with `size` codes."""

    CLASSES: ClassVar[Mapping[str, tuple[str, str | None]]] = CODECS
    size: int
    decoded_rate: int
    decoded_hop: int
    """Samples per unit of the sound that it decodes, at `decoded_rate`."""

    def __init__(self, path: Path, model_type: str, codebooks: int, window_seconds: float, device: str):
        super().__init__(path, model_type, window_seconds, device)
        self.describe(self.model.config)
        self.codebooks = codebooks
        if not 1 <= codebooks <= self.most_codebooks:
            raise UserError(f"{path}: {codebooks} codebooks of a {model_type} model that has {self.most_codebooks}")

    @abstractmethod
    def describe(self, config: Any) -> None:
        """Sets the rates and sizes from the model's config."""

    most_codebooks = 1

    def decode(self, codes_TK: np.ndarray) -> tuple[np.ndarray, int]:
        """(sound float32 (T * decoded_hop,), its rate) of codes int64 (T, codebooks)."""
        import torch

        def part(start: int, stop: int) -> np.ndarray:
            codes_1KT = torch.from_numpy(codes_TK[start:stop].T[None].copy()).to(self.model.device)
            with torch.inference_mode():
                samples = self.sound(codes_1KT).flatten().float().cpu().numpy()
            exact = np.zeros((stop - start) * self.decoded_hop, np.float32)
            exact[: len(samples)] = samples[: len(exact)]  # odd strides of DAC lose a few samples at the end
            return exact

        per_second = self.sample_rate / self.hop
        rate = self.decoded_rate
        return sound_in_windows(part, len(codes_TK), self.decoded_hop, rate, per_second, self.window_seconds), rate

    def sound(self, codes_1KT: torch.Tensor) -> torch.Tensor:
        """The model's own decoding of codes (1, K, T): samples in any shape."""
        return self.model.decode(codes_1KT).audio_values


class Mimi(Codec):
    """Mimi: the first codebook is semantic, the others are acoustic. 12.5 units per second for the published model.

    It decodes from any number of codebooks from the first on. What the acoustic ones would add is absent then, which
    is another sound than that of acoustic codes 0.
    """

    def describe(self, config: Any) -> None:
        self.sample_rate = self.decoded_rate = config.sampling_rate
        self.hop = self.decoded_hop = config.frame_size
        self.size, self.most_codebooks = int(config.codebook_size), config.num_quantizers

    def run(self, samples_BS: torch.Tensor, beside_BTW: torch.Tensor | None) -> torch.Tensor:
        codes_BKT = self.model.encode(samples_BS[:, None], num_quantizers=self.codebooks).audio_codes
        return codes_BKT.transpose(1, 2)


class Dac(Codec):
    """The Descript Audio Codec, whose codebooks each refine the ones before."""

    def describe(self, config: Any) -> None:
        self.sample_rate = self.decoded_rate = config.sampling_rate
        self.hop = self.decoded_hop = int(config.hop_length)
        self.size, self.most_codebooks = int(config.codebook_size), config.n_codebooks

    def run(self, samples_BS: torch.Tensor, beside_BTW: torch.Tensor | None) -> torch.Tensor:
        return self.model.encode(samples_BS[:, None], n_quantizers=self.codebooks).audio_codes.transpose(1, 2)

    def sound(self, codes_1KT: torch.Tensor) -> torch.Tensor:
        return self.model.decode(audio_codes=codes_1KT).audio_values


class SemanticCodec(Codec):
    """What NeuCodec and X-codec 2 share: one codebook of finite scalar quantisation, 50 units per second, and an
    encoder that reads the waveform beside features of wav2vec2-BERT.

    The features are computed by transformers' SeamlessM4TFeatureExtractor (numpy) as the models' own extractors do with
    torchaudio: log energies in 80 Kaldi mel bands, standardised over the clip. The two were not compared.
    """

    around = 0  # the number of zeros on either side of what the features are computed from

    def describe(self, config: Any) -> None:
        self.sample_rate = getattr(config, "input_sampling_rate", None) or config.sampling_rate
        self.decoded_rate = getattr(config, "output_sampling_rate", None) or config.sampling_rate
        self.decoded_hop = int(config.hop_length)
        self.hop = self.decoded_hop * self.sample_rate // self.decoded_rate
        if (self.sample_rate, self.hop) != (16_000, 320):
            raise UserError(
                f"{config.model_type}: its encoder hears {self.sample_rate} Hz and {self.hop} samples per code, but "
                "its features are those of 16000 Hz and 320 samples"
            )
        # Its own extractor adds a zero and fills the last code, so that one further code of silence is heard.
        self.padding = self.hop
        self.size = int(np.prod(config.quantization_levels))

    @cached_property
    def _extract(self) -> Any:
        from transformers import SeamlessM4TFeatureExtractor

        return SeamlessM4TFeatureExtractor()

    def beside(self, samples: np.ndarray) -> np.ndarray:
        heard = np.pad(samples, (self.around, self.padding + self.around))
        found = self._extract(heard, sampling_rate=self.sample_rate, return_tensors="np")["input_features"]
        return np.asarray(found[0], np.float32)

    def run(self, samples_BS: torch.Tensor, beside_BTW: torch.Tensor | None) -> torch.Tensor:
        units = (samples_BS.shape[1] - self.padding) // self.hop
        codes_B1T = self.model.encode(samples_BS[:, None], input_features=beside_BTW).audio_codes
        return codes_B1T[..., :units].transpose(1, 2)


class NeuCodec(SemanticCodec):
    """NeuCodec, which hears 16 kHz and decodes to 24 kHz."""


class Xcodec2(SemanticCodec):
    """X-codec 2, which hears and decodes to 16 kHz. Its last code, of the zeros after the end, is left out."""

    around = 160


_CLASSES: dict[str, type[Codec]] = {"mimi": Mimi, "neucodec": NeuCodec, "xcodec2": Xcodec2, "dac": Dac}


def extractor(
    name: str,
    model: Path | None,
    layer: int | None,
    window_seconds: float = WINDOW_SECONDS,
    device: str = "cpu",
    codebooks: int = 1,
) -> Extractor:
    """The extractor with a name in EXTRACTORS. Raises UserError where `model`, `layer` or `codebooks` is missing, is
    superfluous, or does not fit."""
    if name not in EXTRACTORS:
        raise UserError(f"speech: unknown extractor {name!r}; known: {', '.join(EXTRACTORS)}")
    if codebooks != 1 and name not in CODECS:
        raise UserError(f"speech: {codebooks} codebooks, but the units of '{name}' are centroids; codecs have several")
    if name == "log_mel":
        return LogMel()
    if not window_seconds >= 4 * CONTEXT_SECONDS:
        raise UserError(f"speech: window_seconds {window_seconds:g}: at least {4 * CONTEXT_SECONDS:g}")
    if model is None or (layer is None) != (name in CODECS):
        raise UserError(f"speech: extractor '{name}' needs a model folder and {'no' if name in CODECS else 'a'} layer")
    if layer is None:
        return _CLASSES[name](model, name, codebooks, window_seconds, device)
    return HiddenStates(model, name, layer, window_seconds, device)
