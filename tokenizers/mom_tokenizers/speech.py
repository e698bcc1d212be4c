"""Speech units: 25 a second, each the nearest k-means centroid of 40 ms of features."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import numpy as np
import soundfile
import soxr

from mom_tokenizers.bundle import fingerprint_files, read_json

SAMPLE_RATE = 16_000
UNITS_PER_SECOND = 25
HOP = SAMPLE_RATE // UNITS_PER_SECOND
EXTRACTORS = ("log_mel", "hubert")
CONFIG, CENTROIDS, MODEL_FOLDER = "speech_tokenizer.json", "centroids.safetensors", "hubert"
MEL_BANDS, MEL_HOP, MEL_WINDOW, MEL_FFT = 40, 160, 400, 512
FRAMES_PER_UNIT = HOP // MEL_HOP

Waveform = tuple[np.ndarray, int]


def decode_audio(data: bytes) -> Waveform:
    """WAV, FLAC, Ogg Vorbis/Opus or MP3 bytes -> (float32 mono waveform in [-1, 1], sample rate in Hz).

    Raises ValueError for bytes that are no recording, end too early, or hold no sample.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            promised, rate = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", error)  # without the buffer's address, different each time
        raise ValueError(f"not a readable recording: {reason}") from error
    if len(samples) == 0 or len(samples) < promised:
        raise ValueError(f"recording ends early: {len(samples)} of {promised} samples")
    waveform = samples.mean(axis=1)
    if not np.isfinite(waveform).all():
        raise ValueError("recording holds samples that are no finite numbers")
    return waveform, rate


def count_units(samples: int, rate: int) -> int:
    """floor(25 * seconds + 1/2), in integers: 40 ms a unit, the last one complete at half or more."""
    return (2 * UNITS_PER_SECOND * samples + rate) // (2 * rate)


def _resampled(waveform: np.ndarray, rate: int) -> np.ndarray:
    """float32 (units * 640,) at 16 kHz: the tail padded with zeros, or cut where it is below half a unit."""
    waveform = np.asarray(waveform, np.float32)
    if waveform.ndim != 1 or rate < 1:
        raise ValueError(f"speech: expected a mono waveform and a rate, got shape {waveform.shape} at {rate} Hz")
    units = count_units(len(waveform), rate)
    if units == 0:
        raise ValueError(f"speech: {len(waveform)} samples at {rate} Hz are below 20 ms, too short for a unit")
    at_16k = waveform if rate == SAMPLE_RATE else soxr.resample(waveform, rate, SAMPLE_RATE)
    exact = np.zeros(units * HOP, np.float32)
    exact[: len(at_16k)] = at_16k[: len(exact)]
    return exact


@lru_cache(maxsize=1)
def _mel_filters() -> np.ndarray:
    """float32 (257, 40)."""
    from transformers.audio_utils import mel_filter_bank

    return mel_filter_bank(
        MEL_FFT // 2 + 1, MEL_BANDS, 20.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    ).astype(np.float32)


def log_mel(samples: np.ndarray) -> np.ndarray:
    """float32 (units, 160): 4 frames of 40 log-mel bands, 10 ms apart, less the clip's mean."""
    around = (MEL_WINDOW - MEL_HOP) // 2
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(samples, around), MEL_WINDOW)[::MEL_HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(MEL_WINDOW).astype(np.float32), MEL_FFT)) ** 2
    mel = power.astype(np.float32) @ _mel_filters()
    # 80 dB below the clip's peak and less is silence, whether digital or not
    decibel = np.log10(np.maximum(mel, max(float(mel.max()) * 1e-8, 1e-10)))
    decibel -= decibel.mean(axis=0)
    return decibel.reshape(-1, FRAMES_PER_UNIT * MEL_BANDS).astype(np.float32)


class HubertFeatures:
    """Hidden states of a HuBERT folder's layer (1 = after the first Transformer layer), exactly 25 a second."""

    def __init__(self, path: Path, layer: int, device: str = "cpu"):
        from transformers import HubertModel

        try:
            model: Any = HubertModel.from_pretrained(str(path), local_files_only=True, use_safetensors=True)
        except Exception as error:
            raise ValueError(f"{path}: not a HuBERT folder with safetensors weights: {error}") from error
        self.model = model.to(device).eval().requires_grad_(False)
        config = self.model.config
        if not 0 <= layer <= config.num_hidden_layers:
            raise ValueError(f"speech: layer {layer} of a HuBERT with {config.num_hidden_layers} layers")
        hop = math.prod(config.conv_stride)
        if hop != HOP:
            raise ValueError(f"{path}: its units are {SAMPLE_RATE / hop:g} a second; {UNITS_PER_SECOND} are needed")
        receptive_field = 1 + sum(
            (kernel - 1) * math.prod(config.conv_stride[:i]) for i, kernel in enumerate(config.conv_kernel)
        )
        self.padding = max(0, receptive_field - hop)
        self.layer = layer
        preprocessor = path / "preprocessor_config.json"
        self.normalize = preprocessor.is_file() and bool(read_json(preprocessor).get("do_normalize", False))

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        import torch

        if self.normalize:
            samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
        padded = torch.from_numpy(np.pad(samples, (0, self.padding)).astype(np.float32))
        with torch.inference_mode():
            states = self.model(padded[None].to(self.model.device), output_hidden_states=True).hidden_states
        return states[self.layer][0].float().cpu().numpy()


class SpeechTokenizer:
    """(float32 mono waveform, sample rate) -> speech units."""

    kind = "units"

    def __init__(
        self,
        centroids: np.ndarray,
        extractor: str = "log_mel",
        *,
        model: str | Path | None = None,
        layer: int | None = None,
        source: Path | None = None,
    ):
        """`centroids`: (units, features). `model`, `layer`: the HuBERT folder and layer of extractor 'hubert'."""
        self._features = _extractor(extractor, model, layer)
        self._centroids = np.ascontiguousarray(centroids, np.float32)
        self._half_norms = 0.5 * (self._centroids.astype(np.float64) ** 2).sum(axis=1)
        self._config = {"extractor": extractor} | ({"layer": layer} if extractor == "hubert" else {})
        self._model = None if model is None else Path(model)
        self._source = source  # the folder it was loaded from: copied by save(), so that the fingerprint stays
        self.size = len(self._centroids)

    @classmethod
    def train(
        cls,
        waveforms: Iterable[Waveform],
        size: int,
        *,
        extractor: str = "log_mel",
        model: str | Path | None = None,
        layer: int | None = None,
        seed: int = 0,
    ) -> SpeechTokenizer:
        """Mini-batch k-means over the features of all waveforms. Raises ValueError for too little speech."""
        from sklearn.cluster import MiniBatchKMeans

        features = _extractor(extractor, model, layer)
        found = [features(_resampled(waveform, rate)) for waveform, rate in waveforms]
        total = sum(map(len, found))
        if total < size:
            raise ValueError(f"speech: {total} frames of 40 ms are too few for {size} units; give more recordings")
        kmeans = MiniBatchKMeans(size, batch_size=10_000, max_iter=50, n_init=1, random_state=seed)
        return cls(kmeans.fit(np.concatenate(found)).cluster_centers_, extractor, model=model, layer=layer)

    @classmethod
    def load(cls, path: str | Path) -> SpeechTokenizer:
        """From a folder as save() writes it. Raises ValueError."""
        path = Path(path)
        files = cls.files(path)
        config = read_json(files[CONFIG])
        if unknown := set(config) - {"extractor", "layer"}:
            raise ValueError(f"{files[CONFIG]}: unknown {sorted(unknown)}; known: extractor, layer")
        from safetensors.numpy import load_file

        try:
            centroids = load_file(files[CENTROIDS])["centroids"]
        except Exception as error:
            raise ValueError(f"{files[CENTROIDS]}: no tensor 'centroids' to be read: {error}") from error
        model = path / MODEL_FOLDER if config.get("extractor") == "hubert" else None
        return cls(centroids, config.get("extractor", ""), model=model, layer=config.get("layer"), source=path)

    @staticmethod
    def files(path: str | Path) -> dict[str, Path]:
        """Name -> file of everything the tokenizer is made of. Raises ValueError when one is missing."""
        path = Path(path)
        for name in (CONFIG, CENTROIDS):
            if not (path / name).is_file():
                raise ValueError(f"{path}: no {name} there; expected a folder written by train_tokenizers.py")
        found = [path / CONFIG, path / CENTROIDS]
        found += [path / MODEL_FOLDER / n for n in ("config.json", "preprocessor_config.json")]
        found += sorted((path / MODEL_FOLDER).glob("*.safetensors"))
        return {str(file.relative_to(path)): file for file in found if file.is_file()}

    @classmethod
    def stored_size(cls, path: str | Path) -> int:
        """Number of units of a stored tokenizer, read from the header of its centroids."""
        from safetensors import safe_open

        with safe_open(str(cls.files(path)[CENTROIDS]), "numpy") as file:
            return int(file.get_slice("centroids").get_shape()[0])

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._source is not None:
            files = self.files(self._source)
        else:
            from safetensors.numpy import save_file

            (directory / CONFIG).write_text(json.dumps(self._config) + "\n")
            save_file({"centroids": self._centroids}, directory / CENTROIDS)
            names = [] if self._model is None else ["config.json", "preprocessor_config.json"]
            weights = [] if self._model is None else sorted(p.name for p in self._model.glob("*.safetensors"))
            files = {
                f"{MODEL_FOLDER}/{name}": self._model / name
                for name in names + weights
                if self._model is not None and (self._model / name).is_file()
            }
        for name, file in files.items():
            if file.resolve() != (directory / name).resolve():
                (directory / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, directory / name)

    def fingerprint(self) -> str:
        """16 hex digits; the same after save and load, and on every machine."""
        if self._source is not None:
            return fingerprint_files(self.kind, self.files(self._source))
        with TemporaryDirectory() as directory:
            self.save(directory)
            return fingerprint_files(self.kind, self.files(directory))

    def features(self, value: Waveform) -> np.ndarray:
        """float32 (units, features) of a waveform, before quantisation."""
        return self._features(_resampled(*value))

    def encode(self, value: Waveform) -> np.ndarray:
        """uint32 (count_units(samples, rate),). Raises ValueError for less than 20 ms."""
        features = self.features(value)
        # |x|^2 is the same for all centroids; float64, so that ties fall alike everywhere
        scores = features.astype(np.float64) @ self._centroids.T.astype(np.float64) - self._half_norms
        return scores.argmax(axis=1).astype(np.uint32)

    def encode_batch(self, values: Sequence[Waveform]) -> list[np.ndarray]:
        # One by one: padding to a common length changes the group norm of HuBERT's extractor, hence units.
        return [self.encode(value) for value in values]

    def decode(self, ids: Sequence[int] | np.ndarray) -> NoReturn:
        raise ValueError("speech: no vocoder is configured, so units cannot be turned into sound")


def _extractor(name: str, model: str | Path | None, layer: int | None) -> Any:
    if name == "log_mel":
        return log_mel
    if name == "hubert":
        if model is None or layer is None:
            raise ValueError("speech: extractor 'hubert' needs a model folder and a layer")
        return HubertFeatures(Path(model), layer)
    raise ValueError(f"speech: unknown extractor {name!r}; known: {', '.join(EXTRACTORS)}")
