"""Validation: one pass over a set, in which every document comes once.

Rows and noise are the same at every step, in every run, and at any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mom_data.batches.batch import first_sequences
from mom_data.batches.loader import batches
from mom_data.order.plan import Lane, Plan
from mom_train.config.model import QUARTERS
from mom_train.model.objective import Counts
from mom_train.passes import Passes

_NOISE = -1  # its own seed


@dataclass(frozen=True)
class Scores:
    """The sums of the losses over one set, and the counts to divide them by."""

    sums: Tensor
    """(M+1,) float64: the cross-entropy by modality of the target, then the squared error of patches."""
    counts: Counts
    text_nats: float
    """The cross-entropy of text targets, without special tokens, which stand for no byte."""
    text_bytes: int
    """The number of UTF-8 bytes of those targets. It is 0 where the tokenizer is not known."""
    rows: int
    """The number of packed rows that were scored."""
    squares_Q: Tensor
    """(4,) float64: the squared error of patches by quarter of the timesteps."""
    patches_Q: Tensor
    """(4,) int64: the number of patches in each quarter."""

    def figures(self, prefix: str, passes: Passes) -> dict[str, float]:
        """The figures that are logged: `loss/...` as in training; `bits_per_byte/text`, which does not depend on the
        text tokenizer; `mse/t0` to `mse/t3`, the squared error per channel. A figure without targets is left out."""
        values = passes.means(prefix, self.sums, self.counts)
        if self.text_bytes:
            values[f"{prefix}bits_per_byte/text"] = self.text_nats / math.log(2) / self.text_bytes
        diffusion = passes.config.objective.diffusion
        if diffusion is not None:
            for q, (squares, patches) in enumerate(zip(self.squares_Q.tolist(), self.patches_Q.tolist(), strict=True)):
                if patches:
                    values[f"{prefix}mse/t{q}"] = squares / (patches * diffusion.patch_width)
        return values


def rows_of(plan: Plan, limit: int | None) -> tuple[int, bool]:
    """Returns (the number of rows of one pass over a set, at most `limit`; whether there are more). It only plans."""
    rows = sum(1 for _ in islice(Lane(plan, 0), None if limit is None else limit + 1))
    return (rows, False) if limit is None or rows <= limit else (limit, True)


@torch.no_grad()
def score(
    passes: Passes,
    plan: Plan,
    sequences: int | None,
    bytes_of_id: np.ndarray | None,
    interrupted: Callable[[], bool] = bool,
) -> Scores | None:
    """Scores one pass over a set, or its first `sequences` rows. Every rank runs as many forward passes: rows after the
    last one are padding without targets. Returns None once `interrupted` is true, which it must be on all ranks alike
    and is asked before each forward pass. `bytes_of_id` (V,): see `data.text_bytes`."""
    passes.model.eval()
    ranks, config, M = passes.ranks, passes.config, len(passes.modalities)
    context, micro_batch = passes.context, config.training.micro_batch
    at_once = micro_batch * context.data_ranks
    bytes_V = torch.from_numpy(np.zeros(passes.vocab.size, np.int64) if bytes_of_id is None else bytes_of_id)
    is_text_V = (bytes_V > 0).to(ranks.device)
    share = context.share(at_once, micro_batch)
    sums = torch.zeros(M + 2 + QUARTERS, dtype=torch.float64, device=ranks.device)
    counts = torch.zeros(M + 2 + QUARTERS, dtype=torch.int64)
    rows, _ = rows_of(plan, sequences)
    stream = batches(plan, passes.vocab, share, corrupt_share=config.data.corrupt_share)
    for batch in islice(stream, -(-rows // at_once)):
        if interrupted():
            return None
        batch = first_sequences(batch, rows)
        scored = passes.score(batch, _NOISE)
        nats_T = torch.where(is_text_V[scored.labels_T.clamp_min(0)], scored.losses.tokens_T, 0.0)
        sums[: M + 1] += scored.sums[: M + 1]  # the z-loss is a figure of training
        sums[M + 1] += nats_T.sum(dtype=torch.float64)  # 0 where there is no label
        if context.rank == 0:  # a row's first rank counts for all that share it
            counts[:M] += passes.targets(batch)
            counts[M] += len(batch.latent_position)
            counts[M + 1] += bytes_V[batch.labels[batch.labels >= 0]].sum()
        if scored.patches is not None:
            assert config.objective.diffusion is not None
            quarter_I = scored.patches.timestep * QUARTERS // config.objective.diffusion.steps
            quarter_I = quarter_I.long().clamp(0, QUARTERS - 1)  # of a shifted schedule, timesteps are no whole numbers
            quarter_P = quarter_I[scored.patches.picture.long()]
            sums[M + 2 :].index_add_(0, quarter_P, scored.losses.patches_P.double())
            counts[M + 2 :] += torch.bincount(quarter_P, minlength=QUARTERS).cpu()
    dist.all_reduce(counts)
    dist.all_reduce(sums)
    return Scores(
        sums[: M + 1],
        Counts(counts[:M], int(counts[M]), rows * config.data.sequence_length),
        float(sums[M + 1]),
        int(counts[M + 1]),
        rows,
        sums[M + 2 :].cpu(),
        counts[M + 2 :],
    )


def validate(
    passes: Passes, plans: Mapping[str, Plan], bytes_of_id: np.ndarray | None, interrupted: Callable[[], bool]
) -> dict[str, float]:
    """Returns the figures of each set as val/SET/..., or nothing once all ranks know that one was `interrupted`."""
    values: dict[str, float] = {}
    for name, plan in plans.items():
        scores = score(passes, plan, passes.config.validation.sequences, bytes_of_id, interrupted)
        if scores is None:
            return {}
        values |= scores.figures(f"val/{name}/", passes)
    return values
