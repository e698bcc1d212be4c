"""Prepares a packed batch for the model (noised pictures, dropped conditions) and makes the mean loss of a step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mom_data.batches.batch import IGNORE, PackedBatch
from mom_data.shards.dataset import TokenDataset
from mom_tokenizers.errors import UserError
from mom_tokenizers.vocab import VocabLayout
from mom_train.config.model import DiffusionConfig, ObjectiveConfig
from mom_train.config.run import RunConfig
from mom_train.distributed.context import Context
from mom_train.model.diffusion import NoisedPatches, draw, noise, told, without_condition
from mom_train.model.language_model import Losses
from mom_train.ops.layout import RowLayout


@dataclass(frozen=True)
class Counts:
    """The counts that losses are divided by, over a whole optimiser step (all ranks, all micro-batches)."""

    targets_M: Tensor
    """Number of targets of the cross-entropy by modality, int64 on the CPU."""
    patches: int
    """Number of latent patches."""
    positions: int
    """Number of positions, including padding."""

    def objective(self, losses: Losses, config: ObjectiveConfig) -> Tensor:
        """The loss of this rank: the mean cross-entropy (Chameleon), plus lambda times the mean squared error of
        pictures (Transfusion).

        `losses` are the sums of this rank, so the gradients of the ranks add up to the gradient of the means. If there
        are routers, their load-balance loss is added. It alone depends on how the step is divided into ranks and
        micro-batches.
        """
        loss = losses.tokens / max(1, int(self.targets_M.sum()))
        loss = loss + config.load_balance * losses.balance / self.positions
        if config.diffusion is not None:
            loss = loss + config.diffusion.weight * losses.patches / max(1, self.patches * config.diffusion.patch_width)
        return loss


def names_of_sums(config: RunConfig) -> list[str]:
    """Names of the S loss sums of a step, which the ranks add up in one operation: the cross-entropy by modality of
    the target, the squared error of patches, and where objective.z_loss is above 0 the z-loss."""
    return [*config.layout.modalities, "patches", *(["z-loss"] if config.objective.z_loss else [])]


def with_latents_of(config: DiffusionConfig | None, datasets: Sequence[TokenDataset]) -> DiffusionConfig | None:
    """The config in which null for scale and shift is replaced by the values in the manifests of the datasets.

    Raises UserError if datasets hold latents of another width than `patch_width`, latents that differ in scale or
    shift, or latents although there is no diffusion.
    """
    found: dict[tuple[float, float], TokenDataset] = {}
    for dataset in datasets:
        width = dataset.manifest["latent_width"]
        if not width:
            continue
        if config is None:
            raise UserError(
                f"{dataset.location} holds latent patches: set objective.diffusion.patch_width={width}, or tokenize "
                "with a tokenizer of codes"
            )
        made_by = dataset.tokenizers.get("image", {})
        values = width // 2 if made_by.get("log_variance") else width
        if values != config.patch_width:
            raise UserError(
                f"{dataset.location} holds patches of {values} values, but objective.diffusion.patch_width is "
                f"{config.patch_width}"
            )
        found.setdefault((made_by.get("latent_scale", 1.0), made_by.get("latent_shift", 0.0)), dataset)
    if config is None or not found:
        return config
    if len(found) > 1:
        raise UserError(
            "latents differ: "
            + ", ".join(f"{d.location} has scale {scale} and shift {shift}" for (scale, shift), d in found.items())
        )
    [(scale, shift)] = found
    return config.model_copy(
        update={
            "latent_scale": scale if config.latent_scale is None else config.latent_scale,
            "latent_shift": shift if config.latent_shift is None else config.latent_shift,
        }
    )


def row_layout(
    batch: PackedBatch, diffusion: DiffusionConfig | None, past_B: Tensor | None = None, context: Context | None = None
) -> RowLayout:
    """The layout of a batch. With `diffusion`, it also says which picture each latent patch belongs to."""
    picture_BL = None
    if diffusion is not None:
        picture_BL = torch.full_like(batch.document, -1)
        picture_BL.view(-1)[batch.latent_position] = batch.image_of_patch
    fields = (batch.modality, batch.document, batch.order, batch.rows, batch.offsets)
    return RowLayout.build(*fields, past_B=past_B, picture_BL=picture_BL, context=context)


def noised_patches(batch: PackedBatch, seed: int, config: DiffusionConfig) -> NoisedPatches:
    """The patches of all pictures with noise, on the CPU.

    The timestep and noise of a picture follow from the seed, its sequence and its number in it. If patches hold means
    and log-variances, [mu | log s^2], values are first drawn from them: mu + s * eta with eta ~ N(0, 1). `seed` is that
    of the run in training; validation has its own, so that its noise is the same every time.
    """
    pictures = _pictures(batch)
    W = config.patch_width
    drawn = len(pictures) > 0 and batch.latents.shape[1] == 2 * W
    timesteps, epsilon, eta = [], [], []
    for sequence, number, leads, patches in pictures:
        t, generator = draw(seed, sequence, number, config, leads)
        timesteps.append(t)
        epsilon.append(torch.randn(patches, W, generator=generator))
        if drawn:
            eta.append(torch.randn(patches, W, generator=generator))
    timestep_I = torch.tensor(timesteps, dtype=torch.int64)
    epsilon_PW = torch.cat(epsilon) if epsilon else torch.zeros(0, W)
    latents_PW = batch.latents if len(pictures) else torch.zeros(0, W)
    if drawn:
        mean_PW, log_variance_PW = latents_PW.float().split(W, dim=1)
        latents_PW = mean_PW + (log_variance_PW / 2).exp() * torch.cat(eta)
    assert latents_PW.shape[1] == W
    x, target = noise(latents_PW, batch.image_of_patch, timestep_I, epsilon_PW, config)
    row, timestep_I = batch.order.long()[batch.latent_position], told(config, timestep_I, batch.image_of_patch)
    return NoisedPatches(x, target, row, batch.image_of_patch, timestep_I)


def drop_conditions(batch: PackedBatch, seed: int, config: DiffusionConfig, vocab: VocabLayout) -> PackedBatch:
    """Removes the condition of a share of the pictures, to train the unconditional pass of classifier-free guidance.

    In the document of such a picture, `without_condition` says what remains before it. Nothing there has a loss.
    """
    if not config.condition_dropout:
        return batch
    tokens, labels = batch.tokens.clone(), batch.labels.clone()
    L = tokens.shape[1]
    for i, (sequence, number, _, _) in enumerate(_pictures(batch)):
        digest = hashlib.blake2b(f"condition/{seed}/{sequence}/{number}".encode(), digest_size=8).digest()
        if int.from_bytes(digest, "little") >= config.condition_dropout * 2**64:
            continue
        row, at = divmod(int(batch.latent_position[batch.image_of_patch == i][0]), L)
        document = batch.document[row]
        before = slice(int((document == document[at]).nonzero()[0]), at - 1)  # up to the opening bracket
        tokens[row, before] = without_condition(tokens[row, before], vocab)
        labels[row, before] = IGNORE
    return replace(batch, tokens=tokens, labels=labels)


def _pictures(batch: PackedBatch) -> list[tuple[int, int, bool, int]]:
    """For every picture: (sequence, number within it, whether text follows it in its document, number of patches)."""
    L = batch.tokens.shape[1]
    counts = torch.bincount(batch.image_of_patch, minlength=len(batch.image_leads)).tolist()
    rows = (batch.latent_position // L).tolist()
    seen: dict[int, int] = {}
    pictures, at = [], 0
    for leads, n in zip(batch.image_leads.tolist(), counts, strict=True):
        sequence = int(batch.sequences[rows[at]])
        number = seen.get(sequence, 0)
        seen[sequence] = number + 1
        pictures.append((sequence, number, leads, n))
        at += n
    return pictures
