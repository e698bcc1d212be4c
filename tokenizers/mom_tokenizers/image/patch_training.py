"""Trains the tokenizer of kind "patches" in about a minute on one core.

The codebook is k-means of the squares of pixels, done in the space of their first principal components. It is frozen
then, so the codes of all pictures are computed once, and only the decoder's network is trained.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from tqdm import tqdm

from mom_tokenizers.errors import UserError
from mom_tokenizers.image.measures import psnr
from mom_tokenizers.image.patches import PatchImageTokenizer

if TYPE_CHECKING:
    import torch

    from mom_tokenizers.image.patch_network import PatchAutoencoder

LOG_EVERY = 25  # steps
ABSOLUTE_WEIGHT = 0.1  # of the absolute error; the squared error, which PSNR measures, has the weight 4
TWINS = 6.0  # two entries nearer than this, as vectors of values from 0 to 255, are merged


class Strict(BaseModel):
    """A section of the recipe of tokenizers: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PatchConfig(Strict):
    """The settings of a tokenizer with `size` codes, each for a square of `patch` x `patch` pixels. At most
    `max_squares` squares, described by `components` principal components, are clustered."""

    kind: Literal["patches"] = "patches"
    size: int = Field(ge=2)
    resolution: PositiveInt
    patch: PositiveInt = 4
    components: PositiveInt = 16
    max_squares: PositiveInt = 60_000
    channels: int = Field(48, ge=8, multiple_of=8)
    blocks: NonNegativeInt = 1
    max_images: int = Field(20_000, ge=20)
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 2e-3
    steps: NonNegativeInt = 800


def train_patches(
    config: PatchConfig, train: torch.Tensor, test: torch.Tensor, directory: Path, seed: int, device: str
) -> tuple[PatchImageTokenizer, dict[str, Any]]:
    """Train with pictures uint8 (N, 3, H, W), and save into `directory`. Returns (the tokenizer on the CPU; figures of
    the held-out pictures `test`). Raises UserError for pictures with fewer different squares than codes."""
    import torch

    from mom_tokenizers.image.patch_network import PatchAutoencoder

    if config.resolution % config.patch:
        raise UserError(f"image: resolution {config.resolution} is no multiple of patch {config.patch}")
    model = PatchAutoencoder(config.patch, config.size, config.channels, config.blocks)
    squares = model.squares(train.float()).flatten(0, 1)
    mean_D = squares.mean(0)
    components = min(config.components, squares.shape[1])
    # eigh sorts upwards, so the last vectors belong to the largest variances.
    basis_DK = torch.linalg.eigh((squares - mean_D).T @ (squares - mean_D))[1][:, -components:]
    model.codebook.copy_(_codebook(squares, mean_D, basis_DK, config, seed))
    tokenizer = PatchImageTokenizer(model, config.resolution)

    side = config.resolution // config.patch
    with torch.inference_mode():
        codes = torch.cat([model.encode(_scaled(b)) for b in tqdm(train.split(256), desc="image codes")])
        first = torch.cat([model.decode(model.encode(_scaled(b))) for b in test.split(64)])
        held_out = model.squares(test.float())
        projected = ((held_out - mean_D) @ basis_DK) @ basis_DK.T + mean_D
        pca = torch.nn.functional.fold(
            projected.transpose(1, 2), test.shape[2:], config.patch, stride=config.patch
        ).clamp(0, 255)
    losses = _train_network(model, squares.view(len(train), side**2, -1), codes.clone(), config, device)
    tokenizer.save(directory)
    original = test.numpy() / 255
    return tokenizer, {
        "psnr_without_network": psnr((first.numpy() + 1) / 2, original),
        "psnr_without_quantization": psnr(pca.numpy() / 255, original),
        "losses": losses,
    }


def _codebook(
    squares: torch.Tensor, mean_D: torch.Tensor, basis_DK: torch.Tensor, config: PatchConfig, seed: int
) -> torch.Tensor:
    """The entries, uint8 (size, D), which differ from each other."""
    import torch
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    draw = torch.Generator().manual_seed(seed)
    # Much of a drawing is empty, so each different square is clustered once, with its frequency as weight.
    distinct, counts = torch.unique(squares.to(torch.uint8), dim=0, return_counts=True)
    if len(distinct) < config.size:
        raise UserError(
            f"image: {len(distinct)} different squares are too few for {config.size} codes; give more pictures or set "
            "a lower image.size"
        )
    some = torch.randperm(len(distinct), generator=draw)[: max(config.max_squares, config.size)]
    points = ((distinct[some].float() - mean_D) @ basis_DK).numpy()
    weights = counts[some].double()
    chosen = torch.multinomial(weights, config.size, generator=draw).numpy()
    # With several threads, scikit-learn adds up in an order that changes from run to run.
    with threadpool_limits(1):
        first = KMeans(config.size, init=points[chosen], n_init=1, max_iter=5, tol=0)
        first.fit(points, sample_weight=weights.numpy())
        centres = _without_twins(first.cluster_centers_, points, weights, first.labels_, draw)
        last = KMeans(config.size, init=centres, n_init=1, max_iter=3, tol=0)
        last.fit(points, sample_weight=weights.numpy())
    pixels = torch.from_numpy(last.cluster_centers_).float() @ basis_DK.T + mean_D
    entries = torch.unique(pixels.round().clamp(0, 255).to(torch.uint8), dim=0)
    # Rounding may make two entries the same. Squares of the corpus that are no entries yet take the free places.
    missing = config.size - len(entries)
    if missing:
        both, times = torch.unique(torch.cat([entries, entries, distinct]), dim=0, return_counts=True)
        entries = torch.cat([entries, both[times == 1][:missing]])
    return entries


def _without_twins(
    centres: np.ndarray, points: np.ndarray, weights: torch.Tensor, labels: np.ndarray, draw: torch.Generator
) -> np.ndarray:
    """Centres without those that are nearly the same as an earlier one, and without unused ones. Points that are far
    from their centres take their places."""
    import torch

    distances = torch.cdist(torch.from_numpy(centres), torch.from_numpy(centres)).tril(-1)
    twins = ((distances < TWINS) & torch.ones_like(distances, dtype=torch.bool).tril(-1)).any(1).numpy()
    free = np.flatnonzero(twins | (np.bincount(labels, minlength=len(centres)) == 0))
    if len(free):
        errors = torch.from_numpy(((points - centres[labels]) ** 2).sum(1)).double() * weights
        centres = centres.copy()
        centres[free] = points[torch.multinomial(errors + 1e-9, len(free), generator=draw).numpy()]
    return centres


def _train_network(
    model: PatchAutoencoder, squares_NPD: torch.Tensor, codes: torch.Tensor, config: PatchConfig, device: str
) -> list[dict[str, float]]:
    """Train the decoder's network to add what squares have beyond the entries of their codes. Returns the errors at
    some steps. At the end the model is on the CPU and its weights are frozen."""
    import torch

    model.to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)

    def factor(step: int) -> float:
        progress = step / max(1, config.steps)
        return progress / 0.05 if progress < 0.05 else 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95)) + 0.01

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step + 1))
    losses = []
    for step in tqdm(range(config.steps), desc="image", unit="step"):
        chosen = torch.randint(len(codes), (config.batch_size,))
        some = codes[chosen].to(device)
        wanted = squares_NPD[chosen].to(device) - model.codebook[some].float().flatten(1, 2)
        difference = (model.correction(some).flatten(1, 2) - wanted) / 127.5
        mse = difference.square().mean()
        optimizer.zero_grad(set_to_none=True)
        (4 * mse + ABSOLUTE_WEIGHT * difference.abs().mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % LOG_EVERY == 0 or step == config.steps - 1:
            losses.append({"step": step, "mse": round(float(mse.detach()), 6)})
    model.to("cpu").eval().requires_grad_(False)
    return losses


def _scaled(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1
