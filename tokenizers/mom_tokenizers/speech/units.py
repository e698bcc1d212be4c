"""The speech tokenizer. It makes 25 units per second, each the k-means centroid nearest to the features of 40 ms, or
takes the codes of a codec.

A stored tokenizer is a folder with speech_tokenizer.json, centroids.safetensors, and, where its extractor is a
published model, that model's folder under the extractor's name. It may also have a vocoder in the folder `vocoder`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mom_tokenizers.base import fingerprint_files, read_json
from mom_tokenizers.errors import UserError
from mom_tokenizers.media.recordings import Waveform
from mom_tokenizers.media.recordings import decode_audio as decode_audio  # exported for users of this module
from mom_tokenizers.speech.codecs import CODECS, Codec
from mom_tokenizers.speech.codecs import extractor as make_extractor
from mom_tokenizers.speech.delay import delayed, undelayed
from mom_tokenizers.speech.features import (
    MEL_BANDS,
    MODELS,
    SAMPLE_RATE,
    UNITS_PER_SECOND,
    WINDOW_SECONDS,
    load_model,
    log_mel,
    mean_bands,
    sound_of_log_mel,
)
from mom_tokenizers.speech.vocoders import FOLDER as VOCODER
from mom_tokenizers.speech.vocoders import Units, Vocoder, load_vocoder

CONFIG, CENTROIDS = "speech_tokenizer.json", "centroids.safetensors"
KEYS: dict[str, tuple[tuple[type, ...], float | None]] = {
    "extractor": ((str,), None),
    "layer": ((int,), None),
    "window_seconds": ((int, float), 0),
    "deduplicate": ((bool,), None),
    "codebooks": ((int,), 1),
    "units_per_second": ((int, float), 1e-9),
    "size": ((int,), 1),
}
"""The keys of the config, each with the types of its values and the least of them."""
ASSIGNED_AT_ONCE = 4_096


def count_units(samples: int, rate: int, per_second: float | Fraction = UNITS_PER_SECOND) -> int:
    """The number of units of a clip, floor(per_second * seconds + 1/2), computed in whole numbers. At 25 per second a
    unit takes 40 ms, and the last one counts where at least half of it is there."""
    return (2 * Fraction(per_second) * samples + rate) // (2 * rate)


def read_centroids(file: str | Path) -> np.ndarray:
    """Centroids, float32 (units, features), from a .npy or a .safetensors file. The latter holds them as 'centroids' or
    as its only tensor.

    Raises UserError for any other file. Files of joblib and torch are pickles, which can run code when they are read.
    """
    file = Path(file)
    if file.suffix == ".safetensors":
        from safetensors.numpy import load_file

        try:
            tensors = load_file(file)
        except Exception as error:
            raise UserError(f"{file}: not a safetensors file: {error}") from error
        found = tensors.get("centroids", next(iter(tensors.values())) if len(tensors) == 1 else None)
        if found is None:
            raise UserError(f"{file}: no tensor 'centroids' among {sorted(tensors)}")
    elif file.suffix == ".npy":
        try:
            found = np.load(file, allow_pickle=False)
        except ValueError as error:
            raise UserError(f"{file}: not an array of numbers: {error}") from error
    else:
        raise UserError(
            f"{file}: centroids are read from .safetensors or .npy only, for pickles run code when they are read. "
            'Where you trust the file, convert a k-means of scikit-learn once: python -c "import joblib, numpy; '
            f"numpy.save('centroids.npy', joblib.load('{file.name}').cluster_centers_)\""
        )
    if found.ndim != 2 or found.dtype.kind != "f" or not np.isfinite(found).all():
        raise UserError(f"{file}: expected finite floats (units, features), got {found.dtype} {found.shape}")
    return found.astype(np.float32)


class SpeechTokenizer:
    """Encodes (float32 mono waveform, sample rate) as speech units, and makes sound of them: with the codec whose codes
    they are, with a vocoder, or, for log-mel units without one, by Griffin-Lim."""

    kind = "units"

    def __init__(
        self,
        centroids: np.ndarray | None,
        extractor: str = "log_mel",
        *,
        model: str | Path | None = None,
        layer: int | None = None,
        window_seconds: float = WINDOW_SECONDS,
        deduplicate: bool = False,
        codebooks: int = 1,
        vocoder: str | Path | None = None,
        mean: np.ndarray | None = None,
        device: str = "cpu",
        source: Path | None = None,
    ):
        """`centroids` are (units, features), or None for a codec, which has codes of its own.

        `model` and `layer` are the folder and layer of any extractor but 'log_mel'. Clips longer than `window_seconds`
        go through the model in overlapping windows. `deduplicate` drops every unit that equals the one before it, so
        that durations are lost. `codebooks` is how many of a codec's codebooks are used; several make ids in the delay
        pattern (see delay.py), `codebooks` for each frame. `vocoder` is a folder (see vocoders.py), and `mean` (40,)
        are the log-mel bands of the average clip, both for decode().
        """
        self._model = None if extractor == "log_mel" or model is None else Path(model)
        self._features = make_extractor(extractor, self._model, layer, window_seconds, device, codebooks)
        self.codebooks = codebooks
        self.units_per_second = codebooks * self._features.sample_rate / self._features.hop
        self._vocoder_folder = None if vocoder is None else Path(vocoder)
        self._device = device
        self._config: dict[str, Any] = {"extractor": extractor}
        if layer is not None and extractor != "log_mel":
            self._config["layer"] = layer
        if self._model is not None:
            self._config["window_seconds"] = window_seconds
        if deduplicate:
            self._config["deduplicate"] = True
        self._source = source  # the folder it was loaded from; save() copies it, so that the fingerprint stays the same
        self._tensors: dict[str, np.ndarray] = {}
        if isinstance(self._features, Codec):
            if centroids is not None:
                raise UserError(f"speech: extractor '{extractor}' has a codebook of its own; centroids are of no use")
            if vocoder is not None:
                raise UserError(f"speech: extractor '{extractor}' decodes its own codes; {vocoder} is of no use")
            if deduplicate and codebooks > 1:
                raise UserError(f"speech: {codebooks} codebooks cannot be deduplicated; use one")
            self.size = codebooks * self._features.size
            if codebooks > 1:
                self._config["codebooks"] = codebooks
            self._config |= {"units_per_second": self.units_per_second, "size": self.size}
            return
        if centroids is None:
            raise UserError(f"speech: extractor '{extractor}' needs centroids")
        if np.shape(centroids)[1:] != (self._features.width,):
            raise UserError(
                f"speech: centroids {np.shape(centroids)} are of other features, but the model's are "
                f"{self._features.width} wide"
            )
        self._tensors["centroids"] = np.ascontiguousarray(centroids, np.float32)
        if mean is not None:
            self._tensors["mean"] = np.ascontiguousarray(mean, np.float32)
        self._half_norms = 0.5 * (self._tensors["centroids"].astype(np.float64) ** 2).sum(axis=1)
        self.size = len(centroids)
        if vocoder is not None:
            self._vocoder  # noqa: B018  # one for other units is refused now, not when it is to speak

    @property
    def units(self) -> Units:
        """What a vocoder of these units must fit. Raises UserError for a codec's."""
        if isinstance(self._features, Codec):
            raise UserError(f"speech: extractor '{self._config['extractor']}' decodes its own codes without a vocoder")
        return Units(
            self._config["extractor"],
            self.size,
            self._features.width,
            self._features.sample_rate,
            self._features.hop,
            self._config.get("window_seconds", WINDOW_SECONDS),
            self._config.get("deduplicate", False),
        )

    @cached_property
    def _vocoder(self) -> Vocoder:
        assert self._vocoder_folder is not None
        return load_vocoder(self._vocoder_folder, self.units, self._device)

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
        device: str = "cpu",
        vocoder: str | Path | None = None,
    ) -> SpeechTokenizer:
        """Find centroids by mini-batch k-means over the features of all waveforms. Raises UserError for too little
        speech."""
        from sklearn.cluster import MiniBatchKMeans

        if extractor in CODECS:
            raise UserError(f"speech: extractor '{extractor}' has a codebook of its own; there is nothing to train")
        hears = make_extractor(extractor, None if model is None else Path(model), layer, device=device)
        found, means = [], []
        for waveform, rate in waveforms:
            samples = _resampled(waveform, rate, hears.sample_rate, hears.hop)
            pieces = sorted(hears([samples]), key=lambda piece: piece[1])
            found += [features for _, _, features in pieces]
            if extractor == "log_mel":
                means.append(mean_bands(log_mel(samples)))
        total = sum(map(len, found))
        if total < size:
            raise UserError(f"speech: {total} frames of 40 ms are too few for {size} units; give more recordings")
        kmeans = MiniBatchKMeans(size, batch_size=10_000, max_iter=50, n_init=1, random_state=seed)
        return cls(
            kmeans.fit(np.concatenate(found)).cluster_centers_,
            extractor,
            model=model,
            layer=layer,
            vocoder=vocoder,
            mean=np.mean(means, axis=0) if means else None,
            device=device,
        )

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> SpeechTokenizer:
        """Load a folder that save() wrote. Raises UserError where it is not such a folder."""
        path = Path(path)
        files, config = cls.files(path), cls._stored(path)
        tensors: dict[str, np.ndarray] = {}
        if CENTROIDS in files:
            from safetensors.numpy import load_file

            try:
                tensors = load_file(files[CENTROIDS])
                tensors["centroids"]
            except Exception as error:
                raise UserError(f"{files[CENTROIDS]}: no tensor 'centroids' to be read: {error}") from error
        name = config.get("extractor", "")
        loaded = cls(
            tensors.get("centroids"),
            name,
            model=path / name,
            layer=config.get("layer"),
            window_seconds=config.get("window_seconds", WINDOW_SECONDS),
            deduplicate=config.get("deduplicate", False),
            codebooks=config.get("codebooks", 1),
            vocoder=path / VOCODER if (path / VOCODER).is_dir() else None,
            mean=tensors.get("mean"),
            device=device,
            source=path,
        )
        for key, value in (("units_per_second", loaded.units_per_second), ("size", loaded.size)):
            if config.get(key, value) != value:
                raise UserError(f"{files[CONFIG]}: {key} {config[key]}, but the model's is {value:g}")
        return loaded

    @classmethod
    def _stored(cls, path: str | Path) -> dict[str, Any]:
        """The settings in a stored tokenizer's config. Raises UserError for a key that is unknown or has a wrong value,
        and where that of a codec lacks the size and rate of its codes, which are read without building its model."""
        file = cls.files(path)[CONFIG]
        config = read_json(file)
        if unknown := set(config) - set(KEYS):
            raise UserError(f"{file}: unknown {sorted(unknown)}; known: {', '.join(KEYS)}")
        for key, value in config.items():
            kinds, least = KEYS[key]
            if type(value) not in kinds or (least is not None and not least <= value < math.inf):
                raise UserError(f"{file}: {key} cannot be {value!r}")
        if config.get("extractor") in CODECS:
            for key in ("size", "units_per_second"):
                if key not in config:
                    raise UserError(f"{file}: '{key}' is missing; mom train-tokenizers writes it for a codec")
        return config

    @staticmethod
    def files(path: str | Path) -> dict[str, Path]:
        """The path of every file that decides about units by its name. Raises UserError where one is missing."""
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise UserError(f"{path}: no {CONFIG} there; expected a folder written by train_tokenizers.py")
        name = str(read_json(path / CONFIG).get("extractor"))
        if name not in CODECS and not (path / CENTROIDS).is_file():
            raise UserError(f"{path}: no {CENTROIDS} there; expected a folder written by train_tokenizers.py")
        found = [path / CONFIG, *([] if name in CODECS else [path / CENTROIDS]), *_model_files(path / name)]
        return {str(file.relative_to(path)): file for file in found}

    @classmethod
    def stored_size(cls, path: str | Path) -> int:
        """The number of different units of a stored tokenizer, from its config or the header of its centroids."""
        files = cls.files(path)
        if CENTROIDS not in files:
            return int(cls._stored(path)["size"])
        from safetensors import safe_open

        with safe_open(str(files[CENTROIDS]), "numpy") as file:
            return int(file.get_slice("centroids").get_shape()[0])

    @classmethod
    def stored_rate(cls, path: str | Path) -> dict[str, float | bool]:
        """{"units_per_second"} of a stored tokenizer. Where it also has {"deduplicate": True}, there may be fewer; with
        "codebooks", each frame takes that many units."""
        config = cls._stored(path)
        rate = {"units_per_second": config.get("units_per_second", float(UNITS_PER_SECOND))}
        codebooks = {"codebooks": int(config["codebooks"])} if config.get("codebooks", 1) > 1 else {}
        return rate | codebooks | ({"deduplicate": True} if config.get("deduplicate") else {})

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's folder. A model whose weights are only in a .bin file is written as safetensors."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files: dict[str, Path] = {}
        if self._source is not None:
            files = self.files(self._source)
        else:
            (directory / CONFIG).write_text(json.dumps(self._config) + "\n")
            if self._tensors:
                from safetensors.numpy import save_file

                save_file(self._tensors, directory / CENTROIDS)
            if self._model is not None:
                name = self._config["extractor"]
                found = _model_files(self._model)
                files = {f"{name}/{file.name}": file for file in found}
                if not any(file.suffix == ".safetensors" for file in found):
                    load_model(self._model, name, *(MODELS | CODECS)[name]).save_pretrained(str(directory / name))
                    del files[f"{name}/config.json"]
        if self._vocoder_folder is not None:
            files |= {f"{VOCODER}/{file.name}": file for file in _model_files(self._vocoder_folder)}
        for relative, file in files.items():
            if file.resolve() != (directory / relative).resolve():
                (directory / relative).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, directory / relative)

    def fingerprint(self) -> str:
        """16 hexadecimal digits, which are the same after save and load, and on every machine."""
        if self._source is not None:
            return fingerprint_files(self.kind, self.files(self._source))
        with TemporaryDirectory() as directory:
            self.save(directory)
            return fingerprint_files(self.kind, self.files(directory))

    def features(self, value: Waveform) -> np.ndarray:
        """The features of a waveform before quantisation, float32 (units, features)."""
        pieces = sorted(self._features([self.resampled(value)]), key=lambda piece: piece[1])
        return np.concatenate([features for _, _, features in pieces])

    def encode(self, value: Waveform) -> np.ndarray:
        """The units of a waveform, uint32 (count_units(samples, rate, units_per_second),), or fewer with `deduplicate`.
        With several codebooks each frame has one unit of each. Raises UserError for less than half a unit."""
        return self.encode_batch([value])[0]

    def encode_batch(self, values: Sequence[Waveform]) -> list[np.ndarray]:
        """The result of `encode` for each waveform. Clips of equal length, and windows of long ones, go through a model
        together."""
        clips = [self.resampled(value) for value in values]
        found = [np.empty((len(samples) // self._features.hop, self.codebooks), np.uint32) for samples in clips]
        for clip, first, features in self._features(clips):
            found[clip][first : first + len(features)] = self._nearest(features) if self._tensors else features
        if self.codebooks > 1:
            return [delayed(codes_TK, self.size // self.codebooks).astype(np.uint32) for codes_TK in found]
        units = [codes_TK[:, 0] for codes_TK in found]
        if self._config.get("deduplicate"):
            return [u[np.r_[True, u[1:] != u[:-1]]] for u in units]
        return units

    def resampled(self, value: Waveform) -> np.ndarray:
        """The waveform as the extractor receives it, float32 (units * hop,). Raises UserError for less than half a
        unit."""
        return _resampled(*value, self._features.sample_rate, self._features.hop)

    def _nearest(self, features: np.ndarray) -> np.ndarray:
        # The nearest centroid c has the largest x·c - |c|^2 / 2, since |x|^2 is the same for all. The sums are in
        # float64, so that near ties are decided alike on all machines.
        centroids_WK = self._tensors["centroids"].T.astype(np.float64)
        """(units, 1)"""
        return np.concatenate(
            [
                (features[i : i + ASSIGNED_AT_ONCE].astype(np.float64) @ centroids_WK - self._half_norms).argmax(axis=1)
                for i in range(0, len(features), ASSIGNED_AT_ONCE)
            ]
        )[:, None]

    def decode(self, ids: Sequence[int] | np.ndarray) -> Waveform:
        """(waveform float32, sample rate) of units: of as many seconds as they stand for, except where a vocoder
        guesses how long deduplicated ones last.

        Raises UserError for units out of range, for no units, for codes that are not in the delay pattern, and for
        hidden states without a vocoder.
        """
        units = np.asarray(ids, np.int64)
        if units.ndim != 1 or not len(units):
            raise UserError(f"speech: expected units (n,), n > 0, got shape {units.shape}")
        if units.min() < 0 or units.max() >= self.size:
            raise UserError(f"speech: unit {units.min()} or {units.max()} lies outside the {self.size} there are")
        if isinstance(self._features, Codec):
            return self._features.decode(undelayed(units, self.codebooks, self._features.size))
        name, centroids = self._config["extractor"], self.centroids(units)
        if self._vocoder_folder is None and name != "log_mel":
            raise UserError(
                f"speech: no vocoder is configured for units of '{name}'; put one into the folder '{VOCODER}' of the "
                "tokenizer, or let train_tokenizers.py train one"
            )
        if self._vocoder_folder is not None:
            return self._vocoder(units, centroids), self._vocoder.rate
        return sound_of_log_mel(centroids.reshape(-1, MEL_BANDS)), SAMPLE_RATE

    def centroids(self, units: np.ndarray) -> np.ndarray:
        """The centroids of units, float32 (n, features). Those of log-mel units are four frames of bands, with the mean
        of the average clip."""
        found = self._tensors["centroids"][units]
        if self._config["extractor"] != "log_mel":
            return found
        mean = self._tensors.get("mean", np.zeros(MEL_BANDS, np.float32))
        return (found.reshape(-1, MEL_BANDS) + mean).reshape(len(units), -1)


def _resampled(waveform: np.ndarray, rate: int, to_rate: int, hop: int) -> np.ndarray:
    """The waveform at `to_rate`, float32 (units * hop,). The end is padded with zeros to a whole unit, or cut off where
    it is shorter than half a unit."""
    waveform = np.asarray(waveform, np.float32)
    if waveform.ndim != 1 or rate < 1:
        raise UserError(f"speech: expected a mono waveform and a rate, got shape {waveform.shape} at {rate} Hz")
    units = count_units(len(waveform), rate, Fraction(to_rate, hop))
    if units == 0:
        raise UserError(
            f"speech: {len(waveform)} samples at {rate} Hz are below {500 * hop / to_rate:g} ms, too short for a unit"
        )
    import soxr  # late, because describing a tokenizer does not need it

    resampled = waveform if rate == to_rate else soxr.resample(waveform, rate, to_rate)
    if len(resampled) == units * hop:
        return resampled
    exact = np.zeros(units * hop, np.float32)
    exact[: len(resampled)] = resampled[: len(exact)]
    return exact


def _model_files(folder: Path) -> list[Path]:
    names = ("config.json", "preprocessor_config.json", "model.safetensors.index.json")
    return [f for f in [*(folder / name for name in names), *sorted(folder.glob("*.safetensors"))] if f.is_file()]
