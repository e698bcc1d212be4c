"""Trains small image tokenizers: a codebook of patches or a VQ autoencoder for codes, or a KL autoencoder (VAE) for
latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Discriminator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, Tag, model_validator
from tqdm import tqdm

from mom_tokenizers.errors import UserError
from mom_tokenizers.image.autoencoder import VQImageTokenizer
from mom_tokenizers.image.kl import KLImageTokenizer, patchify
from mom_tokenizers.image.measures import psnr, usage
from mom_tokenizers.image.patch_training import PatchConfig, Strict, train_patches

if TYPE_CHECKING:
    import torch

LOG_EVERY = 25  # steps
REVIVE_EVERY = 25  # steps after which a code that was not used is replaced by a latent of some picture
COLOUR_WEIGHT = 2.0
USED = 1024  # the number of training pictures whose codes are counted
SHOWN = 16  # the number of pictures in reconstructions.png


class AutoencoderConfig(Strict):
    """The settings of kinds vq and kl. Between two levels the side of the picture is halved, so that with three levels
    32 pixels become 8 positions."""

    resolution: PositiveInt
    block_out_channels: tuple[PositiveInt, ...]
    layers_per_block: PositiveInt = 1
    attention: bool = False
    max_images: int = Field(20_000, ge=20)
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 2e-3

    @property
    def blocks(self) -> dict[str, Any]:
        """The arguments of diffusers' VQModel and AutoencoderKL."""
        levels = len(self.block_out_channels)
        return {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "block_out_channels": self.block_out_channels,
            "layers_per_block": self.layers_per_block,
            "sample_size": self.resolution,
            # With one channel per group this would be instance norm, which removes the picture's colour.
            "norm_num_groups": max(1, math.gcd(32, *self.block_out_channels) // 4),
            "mid_block_add_attention": self.attention,
        }


class VQConfig(AutoencoderConfig):
    """The settings of a VQ autoencoder with `size` codes. It is trained for `autoencoder_steps` without quantisation
    and then for `quantized_steps` with it."""

    kind: Literal["vq"] = "vq"
    size: int = Field(ge=2)
    latent_channels: PositiveInt = 16
    autoencoder_steps: PositiveInt
    quantized_steps: PositiveInt


class KLConfig(AutoencoderConfig):
    """The settings of a KL autoencoder, whose latents form patches of side `patch`."""

    kind: Literal["kl"]
    latent_channels: PositiveInt = 4
    patch: PositiveInt = 2
    kl_weight: NonNegativeFloat = 1e-4
    steps: PositiveInt


class PretrainedConfig(Strict):
    """The settings of latents of a published autoencoder, which is taken as it is (`pretrained.py`)."""

    kind: Literal["kl"]
    folder: Path
    """The folder with its config.json and weights, as `save_pretrained` of diffusers writes it."""
    resolution: PositiveInt
    patch: PositiveInt | None = None
    """The side of patches, in latents. null takes the smallest with which a picture has at most `tokens`."""
    tokens: PositiveInt | None = None
    log_variance: bool = False
    max_images: PositiveInt = 256
    """The number of pictures with which the round trip is measured."""

    @model_validator(mode="after")
    def _fits(self) -> PretrainedConfig:
        if (self.patch is None) == (self.tokens is None):
            raise UserError("give either patch or tokens, from which the patch follows")
        return self


def _kind(value: Any) -> Any:
    if isinstance(value, PretrainedConfig) or (isinstance(value, dict) and "folder" in value):
        return "pretrained"
    if not isinstance(value, dict):
        return getattr(value, "kind", None)
    # Before there was kind patches, a recipe of kind vq needed no kind.
    return value.get("kind", "vq" if "block_out_channels" in value else "patches")


ImageConfig = Annotated[
    Annotated[PatchConfig, Tag("patches")]
    | Annotated[VQConfig, Tag("vq")]
    | Annotated[KLConfig, Tag("kl")]
    | Annotated[PretrainedConfig, Tag("pretrained")],
    Discriminator(
        _kind,
        custom_error_type="kind",
        custom_error_message="an image tokenizer is of kind patches or vq (codes), or of kind kl (latents)",
    ),
]


def train_image(
    config: PatchConfig | VQConfig | KLConfig,
    images: Sequence[np.ndarray],
    directory: Path,
    seed: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train a tokenizer on `device` with pictures uint8 (3, resolution, resolution). Saves it and reconstructions.png
    in `directory`, and returns its figures. Raises UserError for fewer than 20 pictures."""
    import torch

    if len(images) < 20:
        raise UserError(f"{len(images)} pictures are too few to train and hold out; give at least 20")
    torch.manual_seed(seed)
    pixels = torch.from_numpy(np.stack(images)).contiguous(memory_format=torch.channels_last)
    pixels = pixels[torch.from_numpy(np.random.default_rng(seed).permutation(len(pixels)))]
    held_out = min(256, max(SHOWN, len(pixels) // 20))
    test, train = pixels[:held_out], pixels[held_out:]
    if isinstance(config, KLConfig):
        decoded, figures = _train_kl(config, train, test, directory, device)
    else:
        if isinstance(config, VQConfig):
            tokenizer, figures = _train_vq(config, train, test, directory, device)
        else:
            tokenizer, figures = train_patches(config, train, test, directory, seed, device)
        decoded, measured = _measured(tokenizer, train, test)
        figures = measured | figures
    draw(test[:SHOWN].numpy(), decoded[:SHOWN], directory / "reconstructions.png")
    reference = test.numpy() / 255
    return {
        "images": len(train),
        "held_out": held_out,
        "psnr": psnr(decoded / 255, reference),
        "psnr_of_mean_colour": psnr(np.broadcast_to(reference.mean((2, 3), keepdims=True), reference.shape), reference),
        **figures,
    }


def _measured(
    tokenizer: VQImageTokenizer, train: torch.Tensor, test: torch.Tensor
) -> tuple[np.ndarray, dict[str, Any]]:
    """(The pictures of `test` after encoding and decoding, uint8 (N, 3, H, W); figures of the codes). "stable" is the
    share of codes that are the same when the decoded pictures are encoded again."""
    import torch

    with torch.inference_mode():
        codes = torch.cat([tokenizer.quantize(_scaled(b)) for b in test.split(64)])
        used = torch.cat([tokenizer.quantize(_scaled(b)) for b in train[:USED].split(64)])
        side = tokenizer.resolution // tokenizer.downsample
        pixels = torch.cat([tokenizer.reconstruct(c) for c in codes.view(-1, side, side).split(64)])
        decoded = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        again = torch.cat([tokenizer.quantize(_scaled(b)) for b in decoded.split(64)])
    training = usage(used.numpy(), tokenizer.size)
    return decoded.numpy(), {
        "size": tokenizer.size,
        "codes_per_image": tokenizer.codes_per_image,
        **usage(codes.numpy(), tokenizer.size),
        **{f"{name}_in_training": value for name, value in training.items()},
        "stable": round(float((codes == again).float().mean()), 4),
    }


def _train_vq(
    config: VQConfig, train: torch.Tensor, test: torch.Tensor, directory: Path, device: str
) -> tuple[VQImageTokenizer, dict[str, Any]]:
    """Train a plain autoencoder, take k-means of its latents as codebook, and then train both together with
    quantisation. Returns (the tokenizer; figures)."""
    import torch
    from diffusers import VQModel

    model: Any = VQModel(
        **config.blocks,
        latent_channels=config.latent_channels,
        vq_embed_dim=config.latent_channels,
        num_vq_embeddings=config.size,
    )
    tokenizer = VQImageTokenizer(model, config.resolution)  # checks resolution against levels
    quantize: Any = model.quantize
    counts = torch.zeros(config.size)
    latents = torch.empty(0)

    def forward(step: int, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal latents
        if step == config.autoencoder_steps:
            _initialize_codebook(model, train[:1024].to(pixels.device), config.size)
        latents = model.encode(pixels).latents
        if step < config.autoencoder_steps:
            return model.decode(latents, force_not_quantize=True).sample, torch.zeros(())
        quantized, commitment, (_, _, codes) = quantize(latents)
        counts.add_(torch.bincount(codes, minlength=config.size).cpu())
        return model.decode(quantized, force_not_quantize=True).sample, commitment

    def revive(step: int) -> None:
        since = step - config.autoencoder_steps + 1
        if since > 0 and since % REVIVE_EVERY == 0:
            # No code is replaced in the last quarter, because a new code needs some steps to be trained.
            if since < 0.75 * config.quantized_steps:
                _revive(quantize.embedding.weight, latents, counts)
            counts.zero_()

    steps = config.autoencoder_steps + config.quantized_steps
    losses = _optimize(model, train, config, steps, forward, device, "commitment", revive)
    tokenizer.save(directory)

    with torch.inference_mode():
        originals = _scaled(test)
        # For comparison, measure what the autoencoder loses without its codebook.
        unquantized = torch.cat(
            [model.decode(model.encode(b).latents, force_not_quantize=True).sample for b in originals.split(64)]
        )
    plain = ((unquantized.clamp(-1, 1) + 1) / 2).numpy()
    return tokenizer, {
        "psnr_without_quantization": psnr(plain, test.numpy() / 255),
        "losses": losses,
    }


def _train_kl(
    config: KLConfig, train: torch.Tensor, test: torch.Tensor, directory: Path, device: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Train a VAE, and write the mean and the inverse standard deviation of its training latents into its config as
    shift and scale. Returns (the pictures of `test` after encoding and decoding, uint8 (N, 3, H, W); figures)."""
    import torch
    from diffusers import AutoencoderKL

    model: Any = AutoencoderKL(**config.blocks, latent_channels=config.latent_channels)
    KLImageTokenizer(model, config.resolution, config.patch)  # checks resolution against levels and patch

    def forward(_: int, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = model.encode(pixels).latent_dist
        # The mean over latents, not the sum over a picture, so that the weight means the same at every size.
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return model.decode(posterior.sample()).sample, config.kl_weight * divergence

    losses = _optimize(model, train, config, config.steps, forward, device, "kl")
    with torch.inference_mode():
        latents = torch.cat([model.encode(_scaled(b)).latent_dist.mean for b in train.split(64)])
    deviation, shift = float(latents.std()), float(latents.mean())
    model.register_to_config(scaling_factor=1 / deviation, shift_factor=shift)
    tokenizer = KLImageTokenizer(model, config.resolution, config.patch)
    tokenizer.save(directory)

    with torch.inference_mode():
        means = torch.cat([model.encode(_scaled(b)).latent_dist.mean for b in test.split(64)]).numpy()
    patches = patchify(means, config.patch).astype(np.float16)
    decoded = np.stack([np.asarray(tokenizer.decode(p)).transpose(2, 0, 1) for p in patches])
    return decoded, {
        "patches_per_image": tokenizer.patches_per_image,
        "patch_width": tokenizer.patch_width,
        "latent_scale": round(tokenizer.latent_scale, 4),
        "latent_shift": round(shift, 4),
        "latent_deviations": [round(d, 3) for d in latents.std(dim=(0, 2, 3)).tolist()],
        "losses": losses,
    }


def _optimize(
    model: Any,
    train: torch.Tensor,
    config: AutoencoderConfig,
    steps: int,
    forward: Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    device: str,
    penalty_name: str,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[dict[str, float]]:
    """Train the model. `forward(step, pixels)` gives (reconstruction, penalty) of a batch. Returns the errors at some
    steps. At the end the model is on the CPU and its weights are frozen."""
    import torch

    # channels_last is a third faster on CPUs with so few channels.
    model.to(device, memory_format=torch.channels_last).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=steps, pct_start=0.08, cycle_momentum=False
    )
    losses = []
    for step in tqdm(range(steps), desc="image", unit="step"):
        pixels = _scaled(train[torch.randint(len(train), (config.batch_size,))].to(device))
        output, penalty = forward(step, pixels)
        difference = output - pixels
        # Differences in colour are small compared with those in brightness. Without a weight it takes hundreds of steps
        # more to learn them.
        colour = difference - difference.mean(dim=1, keepdim=True)
        reconstruction = sum(d.abs().mean() + d.square().mean() for d in (difference, COLOUR_WEIGHT * colour))
        optimizer.zero_grad(set_to_none=True)
        (reconstruction + penalty).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        after_step(step)
        if step % LOG_EVERY == 0 or step == steps - 1:
            mse = float(difference.detach().square().mean())
            losses.append({"step": step, "mse": round(mse, 6), penalty_name: round(float(penalty.detach()), 6)})
    model.to("cpu", memory_format=torch.contiguous_format).eval().requires_grad_(False)
    return losses


def _initialize_codebook(model: Any, pixels: torch.Tensor, size: int) -> None:
    import torch
    from sklearn.cluster import MiniBatchKMeans

    with torch.no_grad():
        batches = _scaled(pixels).split(64)
        latents = torch.cat([model.encode(b).latents.permute(0, 2, 3, 1).flatten(0, 2) for b in batches]).cpu().numpy()
        if len(latents) < size:
            raise UserError(f"image: {len(latents)} patches are too few for {size} codes; give more pictures")
        kmeans = MiniBatchKMeans(size, batch_size=4096, max_iter=20, n_init=1, random_state=0).fit(latents)
        embedding: Any = model.quantize.embedding
        embedding.weight.copy_(torch.from_numpy(kmeans.cluster_centers_))


def _revive(weight: torch.Tensor, latents: torch.Tensor, counts: torch.Tensor) -> None:
    """Replace unused codes (those with count 0) by latents drawn from the batch, with a probability proportional to
    their distance from the nearest code."""
    import torch

    with torch.no_grad():
        unused = (counts == 0).nonzero()[:, 0].to(weight.device)
        if len(unused) == 0:
            return
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
        distance = torch.cdist(flat, weight).amin(dim=1)
        chosen = torch.multinomial(distance + 1e-8, min(len(unused), len(flat)))
        weight[unused[: len(chosen)]] = flat[chosen]


def _scaled(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


def draw(originals: np.ndarray, decoded: np.ndarray, file: Path) -> None:
    """Write a PNG with a row of originals above a row of reconstructions, both uint8 (N, 3, H, W). Small pictures are
    enlarged to at least about 96 pixels."""
    gap = 2
    rows = [
        np.concatenate([np.pad(p, ((0, 0), (gap, gap), (gap, gap)), constant_values=128) for p in pictures], axis=2)
        for pictures in (originals, decoded)
    ]
    sheet = Image.fromarray(np.concatenate(rows, axis=1).transpose(1, 2, 0))
    factor = max(1, 96 // originals.shape[-1])
    sheet.resize((sheet.width * factor, sheet.height * factor), Image.Resampling.NEAREST).save(file)
