"""How good a tokenizer of pictures is: the error of what comes back, and how its codes are used."""

from __future__ import annotations

import math

import numpy as np


def psnr(pictures: np.ndarray, originals: np.ndarray) -> float:
    """The peak signal-to-noise ratio in dB, as the mean over pictures (N, C, H, W) in [0, 1]."""
    error = ((pictures - originals) ** 2).mean(axis=(1, 2, 3))
    return round(float((-10 * np.log10(np.maximum(error, 1e-10))).mean()), 2)


def usage(codes: np.ndarray, size: int) -> dict[str, float]:
    """{"usage": the share of ids that occur, "perplexity": how many equally frequent ids have the same entropy}."""
    shares = np.bincount(codes.ravel(), minlength=size) / codes.size
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    return {"usage": round(float((shares > 0).mean()), 4), "perplexity": round(math.exp(entropy), 1)}
