"""Scores that need no network and no model to be fetched: how near pictures are to their originals, how good speech
sounds, and what a small recogniser understands of it.

The files of DNSMOS's model come with the package speechmos and those of the recogniser with pocketsphinx; both are
extras (pip install '.[scores]'). speechmos itself is not imported, because its import asks for packages that its model
does not need.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mom_tokenizers.errors import UserError
from mom_tools.model.scores import needed

if TYPE_CHECKING:
    from PIL.Image import Image

RATE = 16_000
DNSMOS_SAMPLES = 144_160  # 9.01 s, which the model hears at once
DNSMOS_FILE = "dnsmos_models/sig_bak_ovr.onnx"
# From what the model says to mean opinions, coefficients from the highest power on (dnsmos.py of speechmos)
DNSMOS_POLYNOMIALS = {
    "signal": (-0.08397278, 1.22083953, 0.0052439),
    "background": (-0.13166888, 1.60915514, -0.39604546),
    "overall": (-0.06766283, 1.11546468, 0.04602535),
}
WINDOW, SIGMA = 11, 1.5  # of the Gaussian window of SSIM
UNDERSTANDS = (
    "pocketsphinx knows English read by people; of espeak-ng's voices it hears about half to nearly all words wrong. "
    "Read the word error rate beside that of the originals, and take a better recogniser (--asr) for numbers to report."
)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """The peak signal-to-noise ratio in dB of two pictures, uint8 (H, W, 3): 10 log10(255² / mean squared error)."""
    error = np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """The structural similarity of two pictures, uint8 (H, W, 3), at most 1 (Wang et al. 2004).

    Means, variances and the covariance are those under a Gaussian window of 11 x 11 pixels with deviation 1.5. The
    index is averaged over all places where the window fits, and over the three colours. Raises UserError for a picture
    that is smaller than the window.
    """
    from scipy.ndimage import correlate1d

    if min(one.shape[:2]) < WINDOW:
        raise UserError(f"SSIM: a picture of {one.shape[1]} x {one.shape[0]} pixels; at least {WINDOW} x {WINDOW}")
    x, y = one.astype(np.float64), other.astype(np.float64)
    weights = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    weights /= weights.sum()
    inside = slice(WINDOW // 2, -(WINDOW // 2))

    def mean(values: np.ndarray) -> np.ndarray:
        blurred = correlate1d(correlate1d(values, weights, axis=0), weights, axis=1)
        return np.asarray(blurred[inside, inside])

    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((index / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean())


def pixels(picture: Image) -> np.ndarray:
    """A picture as uint8 (H, W, 3)."""
    return np.asarray(picture.convert("RGB"))


def noise_like(values: np.ndarray, seed: int) -> np.ndarray:
    """White noise: uint8 of the same shape for a picture, or as loud as a waveform."""
    rng = np.random.default_rng(seed)
    if values.dtype == np.uint8:
        return rng.integers(0, 256, values.shape, dtype=np.uint8)
    loudness = np.sqrt(np.mean(np.square(values, dtype=np.float64)))
    return (loudness * rng.standard_normal(len(values))).astype(np.float32)


class Dnsmos:
    """DNSMOS P.835, a model that guesses how people would rate speech from 1 to 5 (Reddy et al. 2022)."""

    def __init__(self, file: Path | None = None):
        """`file` is sig_bak_ovr.onnx; without it, that of the installed package speechmos. Raises UserError where there
        is none."""
        runtime = needed("onnxruntime", "scores")
        self.file = file or _of_package("speechmos", DNSMOS_FILE, "--dnsmos FILE")
        if not self.file.is_file():
            raise UserError(f"{self.file}: no such file; give DNSMOS's sig_bak_ovr.onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        try:
            self._session = runtime.InferenceSession(str(self.file), options, providers=["CPUExecutionProvider"])
            (given,) = self._session.get_inputs()
            self._input = given.name
            self(np.zeros(RATE, np.float32), RATE)
        except Exception as error:  # whatever the runtime raises for another file or another model
            raise UserError(f"{self.file}: not DNSMOS's sig_bak_ovr.onnx: {error}") from error

    def __call__(self, waveform: np.ndarray, rate: int) -> dict[str, float]:
        """{"signal", "background", "overall"} of a float waveform (n,). Longer ones are heard in parts of 9 s, and the
        last one overlaps; shorter ones are repeated."""
        samples = at_rate(waveform, rate)
        if len(samples) < DNSMOS_SAMPLES:
            samples = np.resize(samples, DNSMOS_SAMPLES)
        last = len(samples) - DNSMOS_SAMPLES
        starts = [*range(0, last, DNSMOS_SAMPLES), last]
        parts = np.stack([samples[start : start + DNSMOS_SAMPLES] for start in starts])
        raw = np.concatenate([self._session.run(None, {self._input: part[None]})[0] for part in parts])
        return {
            name: float(np.polyval(coefficients, raw[:, i]).mean())
            for i, (name, coefficients) in enumerate(DNSMOS_POLYNOMIALS.items())
        }


class Pocketsphinx:
    """The recogniser of English that the package pocketsphinx brings (Huggins-Daines et al. 2006)."""

    def __init__(self) -> None:
        """Raises UserError where the package is not installed."""
        self._decoder = needed("pocketsphinx", "scores").Decoder(samprate=RATE, loglevel="FATAL")

    def __call__(self, waveform: np.ndarray, rate: int) -> str:
        """The text recognised in a float waveform (n,)."""
        samples = (at_rate(waveform, rate) * 32767).astype("<i2")
        self._decoder.start_utt()
        self._decoder.process_raw(samples.tobytes(), full_utt=True)
        self._decoder.end_utt()
        heard = self._decoder.hyp()
        return heard.hypstr if heard else ""


def at_rate(waveform: np.ndarray, rate: int) -> np.ndarray:
    """The waveform at 16 kHz, float32 from -1 to 1. Raises UserError for an empty one."""
    samples = np.asarray(waveform, np.float32)
    if samples.ndim != 1 or not len(samples):
        raise UserError(f"a waveform (n,), n > 0, is needed, got shape {samples.shape}")
    if rate != RATE:
        import soxr

        samples = soxr.resample(samples, rate, RATE)
    return np.clip(samples, -1, 1)


def _of_package(package: str, file: str, option: str) -> Path:
    """A file of an installed package, which is not imported."""
    found: Any = find_spec(package)
    for place in (found.submodule_search_locations or ()) if found else ():
        if (Path(place) / file).is_file():
            return Path(place) / file
    raise UserError(f"no {file} of {package} here: pip install '.[scores]', or give {option}")
