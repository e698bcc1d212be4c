"""Forward and backward passes: the losses and gradients of a step, and a trial step that shows whether memory
suffices."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mom_data.batches.batch import PackedBatch, sort_by_modality
from mom_tokenizers.errors import UserError
from mom_tokenizers.vocab import VocabLayout
from mom_train.config.run import RunConfig
from mom_train.distributed.context import Context
from mom_train.distributed.ranks import Ranks
from mom_train.model.context_scan import slice_of_rows
from mom_train.model.diffusion import NoisedPatches
from mom_train.model.language_model import LanguageModel, Losses
from mom_train.model.objective import Counts, drop_conditions, names_of_sums, noised_patches, row_layout
from mom_train.model.step_graph import StepGraph
from mom_train.ops.layout import RowLayout


@dataclass(frozen=True)
class Scored:
    """The results of one forward pass over one micro-batch, on the device."""

    losses: Losses
    sums: Tensor
    """(S,) float64 without gradient: the loss sums that `names_of_sums` names."""
    labels_T: Tensor
    """(T,) the labels in row order, as `losses.tokens_T`."""
    patches: NoisedPatches | None


class Passes:
    """Runs the forward and backward passes of one rank. It keeps nothing of the run's progress."""

    def __init__(
        self, config: RunConfig, vocab: VocabLayout, ranks: Ranks, model: LanguageModel, context: Context | None = None
    ):
        self.config, self.vocab, self.ranks, self.model = config, vocab, ranks, model
        self.context = context or Context(data_rank=ranks.rank, data_ranks=ranks.world_size)
        self.modalities = vocab.modalities
        self._modality_of_id = torch.from_numpy(vocab.modality_of_id)
        self._on_device = self._modality_of_id.to(ranks.device)

    @cached_property
    def _graph(self) -> StepGraph | None:
        """The passes of a micro-batch as CUDA graphs, if training.cuda_graph asks for them."""
        training = self.config.training
        if not training.cuda_graph:
            return None
        several = max(training.batches.values()) > training.micro_batch
        return StepGraph(self.model, self._scored_alone, self.ranks.device, training.precision != "fp32", several)

    def prepared(self, batch: PackedBatch) -> PackedBatch:
        """Returns the batch as it is trained on: some conditions of pictures may be dropped. Call it before
        counting."""
        diffusion = self.config.objective.diffusion
        if diffusion is None:
            return batch
        return drop_conditions(batch, self.config.seed, diffusion, self.vocab)

    def targets(self, batch: PackedBatch) -> Tensor:
        """The number of cross-entropy targets by modality, (M,) int64."""
        valid = batch.labels[batch.labels >= 0]
        return torch.bincount(self._modality_of_id[valid], minlength=len(self.modalities))

    def forward_backward(self, step_batches: Sequence[PackedBatch], counts: Counts) -> Tensor:
        """Accumulates the gradient of the mean loss over the step, whichever rank or micro-batch holds its targets.

        Returns the loss sums of this rank, (S,) float64, in the order of `names_of_sums`.
        """
        self.model.train()
        sums = torch.zeros(len(names_of_sums(self.config)), dtype=torch.float64, device=self.ranks.device)
        for i, batch in enumerate(step_batches):
            if self._graph is not None:
                sums += self._graph(batch, counts, self.config.objective, first=i == 0)
                continue
            cast(FSDPModule, self.model).set_requires_gradient_sync(i == len(step_batches) - 1)
            scored = self.score(batch, self.config.seed)
            counts.objective(scored.losses, self.config.objective).backward()
            sums += scored.sums
        return sums

    def score(self, batch: PackedBatch, noise_seed: int) -> Scored:
        """Runs the forward pass over this rank's slice of the rows. `noise_seed` decides the noise of pictures."""
        diffusion, device = self.config.objective.diffusion, self.ranks.device
        patches = None
        if diffusion is not None:
            patches = noised_patches(batch, noise_seed, diffusion)
        batch, patches, past_B = slice_of_rows(self.context, batch, patches)
        if self.context.size > 1 and device.type == "cuda":
            batch = batch.pin_memory()
        if patches is not None:
            patches = NoisedPatches(*(self._sent(t) for t in vars(patches).values()))
        batch = batch.to(device)
        layout = row_layout(
            batch,
            diffusion,
            None if past_B is None else self._sent(past_B),
            self.context if self.context.size > 1 else None,
        )
        return self._scored(batch, layout, patches)

    def _scored_alone(self, batch: PackedBatch) -> tuple[Losses, Tensor]:
        """The losses and loss sums of whole rows without latent patches that are on the device."""
        scored = self._scored(batch, row_layout(batch, None), None)
        return scored.losses, scored.sums

    def _scored(self, batch: PackedBatch, layout: RowLayout, patches: NoisedPatches | None) -> Scored:
        """Runs the forward pass over rows that are on the device."""
        labels_T = batch.labels.reshape(-1)[batch.rows]
        with self.autocast():
            losses = self.model(batch.tokens.reshape(-1)[batch.rows], layout, labels_T, patches)
        target_T = self._on_device[labels_T.clamp_min(0)]
        sums = [
            torch.where(target_T == m, losses.tokens_T, 0.0).sum(dtype=torch.float64)
            for m in range(len(self.modalities))
        ]
        sums.append(losses.patches.detach().double())
        if self.config.objective.z_loss:
            sums.append(losses.z.double())
        return Scored(losses, torch.stack(sums), labels_T, patches)

    def _sent(self, t: Tensor) -> Tensor:
        """Copies a tensor to the device without waiting, which needs pinned memory."""
        return (t.pin_memory() if self.ranks.device.type == "cuda" else t).to(self.ranks.device, non_blocking=True)

    def autocast(self) -> AbstractContextManager[None]:
        """The context in which the model computes in the run's precision."""
        if self.config.training.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)

    def total(self, sums: Tensor, counts: Counts) -> Tensor:
        """The loss that is trained on, without its regularisers, from the sums of all ranks (S,). A scalar on their
        device."""
        M = len(self.modalities)
        loss = sums[:M].sum() / max(1, int(counts.targets_M.sum()))
        diffusion = self.config.objective.diffusion
        if diffusion is not None:
            loss = loss + diffusion.weight * sums[M] / max(1, counts.patches * diffusion.patch_width)
        return loss

    def means(self, prefix: str, sums: Tensor, counts: Counts) -> dict[str, float]:
        """The mean losses from the sums of all ranks, in total and by modality of the target: cross-entropy in nats,
        and for continuous pictures the squared error per channel. A modality without targets is left out. Where the
        sums have it, the z-loss per target, as it is part of the trained loss, is added as `z_loss`."""
        targets = counts.targets_M.tolist()
        M = len(targets)
        each = sums.tolist()
        entropy, squares, z = each[:M], each[M], each[M + 1 :]
        values = {m: s / n for m, s, n in zip(self.modalities, entropy, targets, strict=True) if n}
        diffusion = self.config.objective.diffusion
        if diffusion is not None and counts.patches:
            values["image"] = squares / (counts.patches * diffusion.patch_width)
        total = self.total(sums, counts).item()
        found = {f"{prefix}loss/total": total} | {f"{prefix}loss/{m}": v for m, v in values.items()}
        return found | {f"{prefix}z_loss": s / max(1, sum(targets)) for s in z}

    def dry_run(self, optimizer: torch.optim.Optimizer) -> float:
        """Runs one step on full rows of every modality, and leaves weights and moments as they were. Returns the peak
        memory in GiB, or 0 where the device does not tell.

        Raises UserError where memory does not suffice. The passes hold collectives, so a rank without enough memory
        cannot tell the others before it raises: it ends, and its end is what ends them (`ranks.process_group`).
        """
        try:
            batch = self._full_batch()
            counts = Counts(self.targets(batch), len(batch.latent_position), batch.tokens.numel())
            self.forward_backward([batch], counts)
            optimizer.found_inf = torch.ones((), device=self.ranks.device)  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"a full batch does not fit the memory of rank {self.ranks.rank}: {error}. Lower training.micro_batch "
                "(the batch stays: more is accumulated), set training.activation_checkpointing=true, or use more ranks."
            ) from None
        if self.ranks.device.type != "cuda":
            return 0.0
        return torch.cuda.max_memory_allocated() / 2**30

    def _full_batch(self) -> PackedBatch:
        """Makes a micro-batch without padding. Its positions are divided evenly among the modalities, and include
        pictures made of patches where the objective has them."""
        B, L, M = self.config.training.micro_batch, self.config.data.sequence_length, len(self.modalities)
        diffusion = self.config.objective.diffusion
        tokens = torch.zeros(B, L, dtype=torch.int64)
        modality = (torch.arange(L) * M // L).to(torch.uint8).repeat(B, 1)
        labels = torch.zeros(B, L, dtype=torch.int64)
        latents, position = torch.zeros(0, 0, dtype=torch.float16), torch.zeros(0, dtype=torch.int64)
        picture = torch.zeros(0, dtype=torch.int32)
        if diffusion is not None:
            image = self.modalities.index("image")
            position = (modality.reshape(-1) == image).nonzero().squeeze(1)
            latents = torch.zeros(len(position), diffusion.patch_width, dtype=torch.float16)
            picture = (position // L).to(torch.int32)
            labels.reshape(-1)[position] = -100
        order, rows, offsets = sort_by_modality(modality, M)
        return PackedBatch(
            tokens=tokens,
            modality=modality,
            document=torch.zeros(B, L, dtype=torch.int32),
            labels=labels,
            latents=latents,
            latent_position=position,
            image_of_patch=picture,
            image_leads=torch.zeros(B if len(position) else 0, dtype=torch.bool),
            sequences=torch.arange(B),
            order=order,
            rows=rows,
            offsets=offsets,
            real_tokens=offsets.diff(),
        )
