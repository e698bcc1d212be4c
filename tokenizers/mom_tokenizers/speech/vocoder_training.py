"""Trains a vocoder (see inverse_stft.py) of a tokenizer's units on recordings, in minutes on one core.

What is minimised is the distance of short-time spectra at three resolutions (Yamamoto et al. 2020) and of log-mel
bands between the sound and the recording. There is no adversary, which would take hours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mom_tokenizers.errors import UserError
from mom_tokenizers.media.recordings import Waveform
from mom_tokenizers.speech.features import (
    MEL_FFT,
    MEL_HOP,
    MEL_WINDOW,
    SAMPLE_RATE,
    log_mel,
    mean_bands,
    mel_filters,
    sound_of_log_mel,
)
from mom_tokenizers.speech.inverse_stft import InverseSTFT, Shape, save
from mom_tokenizers.speech.units import SpeechTokenizer
from mom_tokenizers.speech.vocoders import frames_of

MOST_SECONDS = 3_600.0
"""No more than an hour of recordings is used, since minutes of training do not see more."""
SEGMENT, BATCH, RATE = 100, 8, 1e-3  # frames, segments of a step, peak learning rate
HELD_OUT = 8  # at most so many clips, and a tenth
RESOLUTIONS = ((512, 160), (1024, 256), (256, 64))  # FFT size and hop


def train_vocoder(
    tokenizer: SpeechTokenizer, waveforms: Sequence[Waveform], steps: int, folder: Path, seed: int = 0,
    device: str = "cpu", **size: int,
) -> dict[str, Any]:  # fmt: skip
    """Train a vocoder in `steps` steps and write it to `folder`. Returns figures: on recordings that were held out, the
    mean distance of log-mel bands between what is decoded and the recording, beside Griffin-Lim's. `size` may
    give other numbers of `channels` and `blocks` than Shape's.

    Raises UserError for units that were deduplicated, for a codec's, and for less than two recordings of a second.
    """
    extractor, width, repeats = frames_of(tokenizer.units)
    if tokenizer.units.deduplicated:
        raise UserError("speech: a vocoder cannot be trained on deduplicated units, whose durations are lost")
    clips = _clips(tokenizer, waveforms, width, repeats)
    if len(clips) < 2:
        raise UserError(f"speech: {len(clips)} recordings of at least a second; a vocoder needs 2, better minutes")
    held_out = max(1, min(HELD_OUT, len(clips) // 10))
    trained_on = clips[held_out:]
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = InverseSTFT(Shape(extractor, width, repeats, **size)).to(device)
    frames = np.concatenate([features for features, _ in trained_on])
    model.mean.copy_(torch.from_numpy(frames.mean(axis=0, dtype=np.float64)))
    # one scale for all, so that features keep their weights among each other
    model.deviation.fill_(float(frames.std(axis=0, dtype=np.float64).mean().clip(1e-3)))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.8, 0.99))
    lengths = np.array([len(features) for features, _ in trained_on], float)
    losses: list[float] = []
    warmup = max(1, min(50, steps // 10))
    for step in tqdm(range(steps), desc="vocoder", unit="step", disable=None):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / warmup) * (0.02 + 0.98 * cosine)
        chosen = rng.choice(len(trained_on), BATCH, p=lengths / lengths.sum())
        segments = [_segment(trained_on[i], rng) for i in chosen]
        x_BTW, sound_BS = (torch.from_numpy(np.stack(of)).to(device) for of in zip(*segments, strict=True))
        loss = _loss(model(x_BTW), sound_BS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    save(model, folder)
    figures: dict[str, Any] = {
        "vocoder_steps": steps,
        "vocoder_loss": round(float(np.mean(losses[-50:])), 3),
        "vocoder_held_out": held_out,
    }
    return figures | distances(tokenizer, folder, clips[:held_out], device)


def distances(tokenizer: SpeechTokenizer, folder: Path, clips: Sequence[Any], device: str = "cpu") -> dict[str, float]:
    """The mean absolute difference of log10 mel bands, without each clip's mean, between recordings and the sound of
    their units by the vocoder and, for log-mel units, by Griffin-Lim."""
    from mom_tokenizers.speech.vocoders import load_vocoder

    vocoder = load_vocoder(folder, tokenizer.units, device)
    found: dict[str, list[float]] = {"log_mel_distance": [], "log_mel_distance_griffin_lim": []}
    for features, sound in clips:
        units = tokenizer.encode((sound, SAMPLE_RATE)).astype(np.int64)
        found["log_mel_distance"].append(_distance(vocoder(units, tokenizer.centroids(units)), sound))
        if tokenizer.units.extractor == "log_mel":
            found["log_mel_distance_griffin_lim"].append(_distance(sound_of_log_mel(features), sound))
    return {name: round(float(np.mean(values)), 3) for name, values in found.items() if values}


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    bands = [log_mel(samples) for samples in (one, other)]
    return float(np.abs((bands[0] - mean_bands(bands[0])) - (bands[1] - mean_bands(bands[1]))).mean())


def _clips(
    tokenizer: SpeechTokenizer, waveforms: Sequence[Waveform], width: int, repeats: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(features of frames (T, W), sound (160 T,)) of recordings of at least a second, all equally loud."""
    clips, taken = [], 0.0
    for waveform in waveforms:
        if taken >= MOST_SECONDS or len(waveform[0]) < waveform[1]:
            continue
        sound = tokenizer.resampled(waveform)
        power = float(np.mean(np.square(sound, dtype=np.float64)))
        if power < 1e-10:
            continue
        sound = (sound * (0.1 / math.sqrt(power))).astype(np.float32)
        units = tokenizer.encode((sound, SAMPLE_RATE)).astype(np.int64)
        features = tokenizer.centroids(units).reshape(-1, width).repeat(repeats, axis=0)
        clips.append((features, sound))
        taken += len(sound) / SAMPLE_RATE
    return clips


def _segment(clip: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    features, sound = clip
    start = int(rng.integers(0, len(features) - SEGMENT + 1))
    return features[start : start + SEGMENT], sound[start * MEL_HOP : (start + SEGMENT) * MEL_HOP]


def _loss(made_BS: Tensor, sound_BS: Tensor) -> Tensor:
    sound_BS = sound_BS + 1e-4 * torch.randn_like(sound_BS)  # digital silence has no logarithm
    loss = (_log_bands(made_BS) - _log_bands(sound_BS)).abs().mean()
    for fft, hop in RESOLUTIONS:
        one, other = (_magnitude(samples, fft, hop).clamp_min(1e-4) for samples in (made_BS, sound_BS))
        convergence = (one - other).norm(dim=(1, 2)) / other.norm(dim=(1, 2))
        loss = loss + ((one.log() - other.log()).abs().mean() + 0.5 * convergence.mean()) / len(RESOLUTIONS)
    return loss


def _magnitude(samples_BS: Tensor, fft: int, hop: int, window: int | None = None) -> Tensor:
    shape = torch.hann_window(window or fft, device=samples_BS.device)
    return torch.stft(samples_BS, fft, hop, window or fft, shape, return_complex=True).abs()


def _log_bands(samples_BS: Tensor) -> Tensor:
    """The logarithm of log_mel's bands, (B, 40, frames), without its floor by clip."""
    filters_FM = torch.from_numpy(mel_filters()).to(samples_BS.device)
    power_BFT = _magnitude(samples_BS, MEL_FFT, MEL_HOP, MEL_WINDOW) ** 2
    return torch.log10((power_BFT.mT @ filters_FM).mT.clamp_min(1e-7))
