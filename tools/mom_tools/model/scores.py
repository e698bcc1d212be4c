"""The figures that `mom score` computes, and the local vision and speech models that it uses for them.

Models are folders of Hugging Face Transformers on this machine. Nothing is fetched, nothing is unpickled, and no code
of a folder runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import bootstrap

from mom_tokenizers.errors import UserError
from mom_tokenizers.published import load_published

if TYPE_CHECKING:
    from PIL.Image import Image

DRAWS = 1000  # of the bootstrap
NORMALISED = "lower case, without punctuation"


@dataclass(frozen=True)
class Score:
    """One line of the table of scores."""

    figure: str
    of: str
    value: float
    interval: tuple[float, float] | None
    """Bootstrap interval of 95 %; a Fréchet distance has none."""
    n: int


def frechet_distance(x_ND: np.ndarray, y_ND: np.ndarray) -> float:
    """Squared Fréchet distance of the normal distributions fitted to two sets of features, in float64:

        |mean_x - mean_y|² + tr(C_x + C_y - 2 (C_x C_y)^½)            (Dowson and Landau 1982; Heusel et al. 2017)

    With X, Y the centred features over sqrt(n - 1), C_x C_y = XᵀX YᵀY has the eigenvalues of (X Yᵀ)(X Yᵀ)ᵀ, so the
    trace of its root is the sum of X Yᵀ's singular values. That needs no root of a singular matrix.
    """
    means, roots = [], []
    for features_ND in (x_ND, y_ND):
        if len(features_ND) < 2:
            raise UserError(f"a covariance of {len(features_ND)} sample: at least 2 are needed")
        features = np.asarray(features_ND, np.float64)
        means.append(features.mean(axis=0))
        # R of the QR form: RᵀR = XᵀX with no more than D rows
        roots.append(np.linalg.qr(features - means[-1], mode="r") / (len(features) - 1) ** 0.5)
    x, y = roots
    return float(((means[0] - means[1]) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * np.linalg.norm(x @ y.T, "nuc"))


def perceptual_distance(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """How differently a vision model sees two pictures, from 0: the squared distance of their features of length 1,
    averaged over positions and layers. This is LPIPS without its learned weights (Zhang et al. 2018)."""
    return float(np.mean([((x - y) ** 2).sum(axis=1).mean() for x, y in zip(one, other, strict=True)]))


def clip_scores(image_ND: np.ndarray, text_ND: np.ndarray) -> np.ndarray:
    """(N,) float64: 100 max(0, cosine) of each pair's embeddings (Hessel et al. 2021, with 100 in place of 2.5)."""
    image, text = (np.asarray(e, np.float64) / np.linalg.norm(e, axis=1, keepdims=True) for e in (image_ND, text_ND))
    return 100 * np.maximum(0, (image * text).sum(axis=1))


def normalised(text: str) -> str:
    """The text in the form in which words are compared, as NORMALISED says."""
    jiwer = needed("jiwer", "scores")
    steps = jiwer.ToLowerCase(), jiwer.RemovePunctuation(), jiwer.RemoveMultipleSpaces(), jiwer.Strip()
    return str(jiwer.Compose(list(steps))(text))


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """(N, 2) int64 by jiwer: the substituted, left out and added words of each hypothesis, and the words of its
    reference. Both texts are normalised. The ratio of the two sums is the word error rate. Raises ValueError for a
    reference without words."""
    jiwer = needed("jiwer", "scores")
    counts = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        words = normalised(reference)
        if not words:
            raise UserError(f"a recording's text has no words: {reference!r}")
        found = jiwer.process_words(words, normalised(hypothesis))
        errors = found.substitutions + found.deletions + found.insertions
        counts.append((errors, found.hits + found.substitutions + found.deletions))
    return np.array(counts, np.int64).reshape(-1, 2)


def interval(sums_N: np.ndarray, counts_N: np.ndarray | None = None, seed: int = 0) -> tuple[float, float] | None:
    """The bootstrap interval of 95 % of sum(sums) / sum(counts), over the choice of the N samples. None for a single
    sample."""
    counts = np.ones(len(sums_N)) if counts_N is None else counts_N
    if len(sums_N) < 2:
        return None
    found = bootstrap(
        (sums_N, counts), lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis), paired=True, vectorized=True,
        n_resamples=DRAWS, batch=50, method="percentile", rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def needed(module: str, extra: str) -> Any:
    """A module of an optional library. Raises ValueError that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"needs {module}: pip install '.[{extra}]' ({error})") from None


class Vision:
    """A vision model that turns pictures into features, and texts too where it was trained on both."""

    def __init__(self, folder: Path, device: str, batch: int = 32):
        """Raises ValueError where the folder holds no such model, or not all of its weights."""
        self._transformers = needed("transformers", "tokenizers")
        self.folder, self._device, self._batch = folder, device, batch
        self._model = _weights(folder, "AutoModel").to(device)
        self._processor = _part(folder, "AutoImageProcessor")
        projected = hasattr(self._model, "get_image_features")
        self.feature = "image embedding" if projected else "pooled output"

    def pictures(self, pictures: Iterable[Image]) -> np.ndarray:
        """The features of pictures, (N, D) float32, not normalised."""
        import torch

        features = [np.zeros((0, 0), np.float32)]
        stream = iter(pictures)
        while some := list(itertools.islice(stream, self._batch)):
            inputs = self._processor(images=[p.convert("RGB") for p in some], return_tensors="pt").to(self._device)
            with torch.inference_mode():
                if hasattr(self._model, "get_image_features"):
                    features.append(_array(self._model.get_image_features(pixel_values=inputs["pixel_values"])))
                else:
                    features.append(_array(self._model(pixel_values=inputs["pixel_values"])))
        return np.concatenate(features[1:] or features)

    def layers(self, picture: Image) -> list[np.ndarray]:
        """The features of every layer at every position, each (positions, D) float64 of length 1, for
        `perceptual_distance`."""
        import torch

        model = getattr(self._model, "vision_model", self._model)
        inputs = self._processor(images=[picture.convert("RGB")], return_tensors="pt").to(self._device)
        with torch.inference_mode():
            states = model(pixel_values=inputs["pixel_values"], output_hidden_states=True).hidden_states
        if not states:
            raise UserError(f"{self.folder}: a {type(self._model).__name__}, which does not show its layers")
        # convolutional models have (1, D, H, W), Transformers (1, positions, D)
        rows = [s[0].flatten(1).T if s.ndim == 4 else s[0] for s in states]
        return [torch.nn.functional.normalize(r.double(), dim=1).cpu().numpy() for r in rows]

    def texts(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """The features of texts, (N, D) float32, not normalised, and how many texts were cut to the length that the
        model reads. Raises ValueError where the model reads no texts."""
        import torch

        if not hasattr(self._model, "get_text_features"):
            raise UserError(
                f"{self.folder}: a {type(self._model).__name__}, which reads no texts; give a CLIP's folder"
            )
        tokenizer = _part(self.folder, "AutoTokenizer")
        longest = self._model.config.text_config.max_position_embeddings
        features, cut = [], 0
        for i in range(0, len(texts), self._batch):
            some = list(texts[i : i + self._batch])
            cut += sum(len(ids) > longest for ids in tokenizer(some)["input_ids"])
            # to the full length: CLIP does not mind, and SigLIP was trained so
            inputs = tokenizer(some, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
            known = {k: v.to(self._device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
            with torch.inference_mode():
                features.append(_array(self._model.get_text_features(**known)))
        return np.concatenate(features), cut


class Recogniser:
    """A speech recogniser, which has a CTC head or is of the kind of Whisper."""

    def __init__(self, folder: Path, device: str, language: str | None = None):
        """`language` is the language that a multilingual Whisper expects; without it, Whisper guesses. Raises
        ValueError as Vision does."""
        transformers = needed("transformers", "tokenizers")
        architectures = _part(folder, "AutoConfig").architectures or ()
        ctc = any(name.endswith("ForCTC") for name in architectures)
        if ctc and language is not None:
            raise UserError(f"{folder}: a recogniser with a CTC head, which takes no --language")
        self._listen = transformers.pipeline(
            "automatic-speech-recognition",
            model=_weights(folder, "AutoModelForCTC" if ctc else "AutoModelForSpeechSeq2Seq"),
            tokenizer=_part(folder, "AutoTokenizer"),
            feature_extractor=_part(folder, "AutoFeatureExtractor"),
            device=device,
        )
        self._rate = int(self._listen.feature_extractor.sampling_rate)
        said = {} if language is None else {"language": language, "task": "transcribe"}
        # greedily: Transformers' default has been one beam and five
        self._options: dict[str, Any] = {} if ctc else {"generate_kwargs": {"num_beams": 1, **said}}
        try:
            self(np.zeros(self._rate, np.float32), self._rate)
        except Exception as error:  # a language it lacks, and whatever else generation finds wrong
            raise UserError(f"{folder}: this recogniser does not work: {error}") from error

    def __call__(self, waveform: np.ndarray, rate: int) -> str:
        """The text recognised in a float waveform (n,) of `rate` Hz, which lasts at most half a minute."""
        import soxr

        samples = np.clip(np.asarray(waveform, np.float32), -1, 1)  # as a WAV would hold it
        if rate != self._rate:
            samples = soxr.resample(samples, rate, self._rate)
        return str(self._listen({"raw": samples, "sampling_rate": self._rate}, **self._options)["text"])


def files_of(folder: Path) -> list[Path]:
    """The files of a model: settings, weights, vocabulary."""
    return sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".txt", ".model"))


def _array(output: Any) -> np.ndarray:
    """(N, D) array of what a model returns: its tensor, its pooled output, or the mean over positions."""
    if hasattr(output, "last_hidden_state"):
        pooled = getattr(output, "pooler_output", None)
        output = output.last_hidden_state.mean(dim=1) if pooled is None else pooled
    return output.float().flatten(1).cpu().numpy()


def _part(folder: Path, name: str) -> Any:
    """The configuration, tokenizer or processor in a model's folder."""
    transformers = needed("transformers", "tokenizers")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json there; give the folder of a Transformers model on this machine")
    try:
        return getattr(transformers, name).from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the libraries below raise
        raise UserError(f"{folder}: no {name} to be had: {error}") from error


def _weights(folder: Path, name: str) -> Any:
    transformers = needed("transformers", "tokenizers")
    _part(folder, "AutoConfig")  # what is wrong with the folder, first
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what is missing, load_published looks for
    safe = {"use_safetensors": True, "trust_remote_code": False}
    return load_published(folder, "transformers", name, **safe).float()
