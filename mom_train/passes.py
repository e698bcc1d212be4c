"""The model on batches: losses and gradients of a step, validation, and one pass to see whether memory suffices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mom_data.batch import PackedBatch, first_sequences
from mom_data.loader import Share, batches
from mom_data.plan import Plan
from mom_tokenizers.vocab import VocabLayout
from mom_train.config import RunConfig
from mom_train.diffusion import NoisedPatches
from mom_train.model import LanguageModel, Losses
from mom_train.objective import Counts, drop_conditions, noised_patches, row_layout
from mom_train.parallel import Ranks

_VALIDATION_NOISE = -1  # its own seed: validation sees the same noise in every run and at every step


class Passes:
    """Forward and backward passes of one rank. Holds nothing of the run's progress."""

    def __init__(self, config: RunConfig, vocab: VocabLayout, ranks: Ranks, model: LanguageModel):
        self.config, self.vocab, self.ranks, self.model = config, vocab, ranks, model
        self.modalities = vocab.modalities
        self._modality_of_id = torch.from_numpy(vocab.modality_of_id)
        self._on_device = self._modality_of_id.to(ranks.device)

    def prepared(self, batch: PackedBatch) -> PackedBatch:
        """The batch as it is trained on, before anything of it is counted."""
        diffusion = self.config.objective.diffusion
        if diffusion is None:
            return batch
        return drop_conditions(batch, self.config.seed, diffusion, self.vocab.specials["null"])

    def targets(self, batch: PackedBatch) -> Tensor:
        """Targets of the cross-entropy by modality (M,) int64."""
        valid = batch.labels[batch.labels >= 0]
        return torch.bincount(self._modality_of_id[valid], minlength=len(self.modalities))

    def forward_backward(self, step_batches: Sequence[PackedBatch], counts: Counts) -> Tensor:
        """Accumulate the gradient of the mean loss over the step, whichever rank or micro-batch holds its targets.
        Returns this rank's sums (M+1,) float64: cross-entropy by modality of the target, squared error of patches."""
        self.model.train()
        sums = torch.zeros(len(self.modalities) + 1, dtype=torch.float64, device=self.ranks.device)
        for i, batch in enumerate(step_batches):
            cast(FSDPModule, self.model).set_requires_gradient_sync(i == len(step_batches) - 1)
            losses, its_sums = self.loss(batch, self.config.seed)
            counts.objective(losses, self.config.objective).backward()
            sums += its_sums
        return sums

    def loss(self, batch: PackedBatch, noise_seed: int) -> tuple[Losses, Tensor]:
        """(the model's losses on one micro-batch, the sums that are logged (M+1,) float64)."""
        diffusion, device = self.config.objective.diffusion, self.ranks.device
        patches = None
        if diffusion is not None:
            patches = noised_patches(batch, noise_seed, diffusion)
            patches = NoisedPatches(*(t.to(device, non_blocking=True) for t in vars(patches).values()))
        batch = batch.to(device)
        layout = row_layout(batch, diffusion)
        labels_T = batch.labels.reshape(-1)[batch.rows]
        with self._autocast():
            losses = self.model(batch.tokens.reshape(-1)[batch.rows], layout, labels_T, patches)
        target_T = self._on_device[labels_T.clamp_min(0)]
        sums = [
            torch.where(target_T == m, losses.tokens_T, 0.0).sum(dtype=torch.float64)
            for m in range(len(self.modalities))
        ]
        return losses, torch.stack([*sums, losses.patches.detach().double()])

    def _autocast(self) -> AbstractContextManager[None]:
        if self.config.training.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)

    def total(self, sums: Tensor, counts: Counts) -> Tensor:
        """The loss that is trained on, without its regularisers, from all ranks' sums (M+1,): a scalar on their
        device."""
        loss = sums[:-1].sum() / max(1, int(counts.targets_M.sum()))
        diffusion = self.config.objective.diffusion
        if diffusion is not None:
            loss = loss + diffusion.weight * sums[-1] / max(1, counts.patches * diffusion.patch_width)
        return loss

    def means(self, prefix: str, sums: Tensor, counts: Counts) -> dict[str, float]:
        """Mean losses from all ranks' sums: in total, and by modality of the target (cross-entropy in nats; for
        continuous pictures the squared error per channel). A modality without targets is left out."""
        *entropy, squares = sums.tolist()
        targets = counts.targets_M.tolist()
        values = {m: s / n for m, s, n in zip(self.modalities, entropy, targets, strict=True) if n}
        diffusion = self.config.objective.diffusion
        if diffusion is not None and counts.patches:
            values["image"] = squares / (counts.patches * diffusion.patch_width)
        total = self.total(sums, counts).item()
        return {f"{prefix}loss/total": total} | {f"{prefix}loss/{m}": v for m, v in values.items()}

    @torch.no_grad()
    def validate(self, plans: Mapping[str, Plan], interrupted: Callable[[], bool]) -> dict[str, float]:
        """Losses on the first `validation.sequences` sequences of each set: the same ones, with the same noise, at any
        world size, and as many passes on every rank. Nothing, once all ranks know that one was `interrupted`."""
        self.model.eval()
        values: dict[str, float] = {}
        micro_batch, world = self.config.training.micro_batch, self.ranks.world_size
        wanted = self.config.validation.sequences
        M = len(self.modalities)
        for name, plan in plans.items():
            share = Share(self.ranks.rank, world, micro_batch * world, micro_batch)
            sums = torch.zeros(M + 1, dtype=torch.float64, device=self.ranks.device)
            counts = torch.zeros(M + 1, dtype=torch.int64)
            stream = batches(plan, self.vocab, share, corrupt_share=self.config.data.corrupt_share)
            for batch in islice(stream, -(-wanted // (micro_batch * world))):
                if interrupted():
                    return {}
                batch = first_sequences(batch, wanted)
                counts[:-1] += self.targets(batch)
                counts[-1] += len(batch.latent_position)
                sums += self.loss(batch, _VALIDATION_NOISE)[1]
            dist.all_reduce(counts)
            dist.all_reduce(sums)
            positions = wanted * self.config.data.sequence_length
            values |= self.means(f"val/{name}/", sums, Counts(counts[:-1], int(counts[-1]), positions))
        return values

    def dry_run(self, optimizer: torch.optim.Optimizer) -> float:
        """A step on full rows of every modality that leaves weights and moments as they were. Returns the peak memory
        in GiB, 0 where the device does not say.

        Raises ValueError where memory does not suffice.
        """
        try:
            batch = self._full_batch()
            counts = Counts(self.targets(batch), len(batch.latent_position), batch.tokens.numel())
            self.forward_backward([batch], counts)
            optimizer.found_inf = torch.ones((), device=self.ranks.device)  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"a full batch does not fit the memory of rank {self.ranks.rank}: {error}. Lower training.micro_batch "
                "(the batch stays: more is accumulated), set training.activation_checkpointing=true, or use more ranks."
            ) from None
        if self.ranks.device.type != "cuda":
            return 0.0
        return torch.cuda.max_memory_allocated() / 2**30

    def _full_batch(self) -> PackedBatch:
        """A micro-batch without padding, its positions dealt evenly to the modalities, pictures of patches among
        them."""
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
        rows = modality.reshape(-1).argsort(stable=True)
        order = torch.empty(B * L, dtype=torch.int32)
        order[rows] = torch.arange(B * L, dtype=torch.int32)
        number = modality.reshape(-1).bincount(minlength=M)
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
            offsets=torch.cat([torch.zeros(1, dtype=torch.int64), number.cumsum(0)]),
            real_tokens=number,
        )
