"""How likely a model finds a segment after others: sums of log-likelihoods, on one rank or divided among several.

A row is <bos>, the segments before, and the target. What several targets have in common is read once, and the state
of the model after it is given to all of them; that changes no value, because the model is causal and a picture is
never divided. Rows are padded on the right, by a document of its own.

Latent pictures have no likelihood that could be computed. Their score is minus the squared error of the denoising, the
mean over channels and over a few draws of timestep and noise, which are the same for all targets (as in arXiv
2303.16203). Latent pictures that stand before a target are read clean, as in sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mom_data.batches.batch import IGNORE, assemble_document
from mom_data.shards.format import TokenSegment
from mom_train.config.model import DiffusionConfig
from mom_train.model.attention import AttentionState
from mom_train.model.diffusion import NoisedPatches, noise, told
from mom_train.model.language_model import LayerStates, Losses
from mom_train.model.mamba import MambaState
from mom_train.ops.layout import RowLayout
from mom_train.passes import Passes

_SEED = 20110  # of the noise of latent pictures, the same in every run


@dataclass(frozen=True)
class Question:
    """Asks how likely each of several targets is after the same segments. Modalities are numbered as in the
    vocabulary."""

    before: tuple[TokenSegment, ...]
    targets: tuple[TokenSegment, ...]
    """All of one modality."""


@dataclass(frozen=True)
class _Row:
    """A question's row with one target, and one draw of noise for a latent target."""

    ids: np.ndarray
    modality: np.ndarray
    first: int
    """The position of the first unit of the target."""
    pictures: tuple[tuple[int, np.ndarray, int], ...]
    """Of each latent picture the position, the patches, and the number of the draw; -1 reads it clean."""
    latent: bool
    slot: int
    """The place of its score among those of all rows."""

    def part(self, start: int, end: int) -> _Row:
        """The row from one position to another, which divide no picture. The target is in it or behind it."""
        kept = tuple((at - start, patches, draw) for at, patches, draw in self.pictures if start <= at < end)
        first = min(self.first, end) - start
        return replace(self, ids=self.ids[start:end], modality=self.modality[start:end], first=first, pictures=kept)


@dataclass(frozen=True)
class _Job:
    """What one rank computes in one round: batches of rows, which may continue a common beginning."""

    batches: tuple[tuple[_Row, ...], ...]
    beginning: _Row | None = None
    """What all rows have in common and is read once. It has no target."""


class Likelihood:
    """Scores targets with the model of a run. What is computed together does not depend on the number of ranks."""

    def __init__(self, passes: Passes, draws: int):
        """`draws` is the number of draws of timestep and noise for each latent target."""
        self.passes, self.draws = passes, draws
        self.vocab, self.device = passes.vocab, passes.ranks.device
        self.diffusion = passes.config.objective.diffusion
        self.positions = passes.config.training.micro_batch * passes.config.data.sequence_length

    @torch.no_grad()
    def score(self, questions: Sequence[Question], interrupted: Callable[[], bool] = bool) -> list[np.ndarray] | None:
        """For each question, the scores of its targets, float64 (n,): the log-likelihood in nats, or for latents minus
        the squared error per channel. Collective; all ranks get all scores. None once `interrupted`, which must be
        true on all ranks alike and is asked before each round of forward passes."""
        rows, slots = self._rows(questions)
        scores = torch.zeros(sum(map(len, rows)), dtype=torch.float64, device=self.device)
        ranks = self.passes.ranks
        self.passes.model.eval()
        with self._eagerly():
            for jobs in self._jobs(rows):
                for start in range(0, len(jobs), ranks.world_size):
                    if interrupted():
                        return None
                    of_round = jobs[start : start + ranks.world_size]
                    # Every rank runs equally many forward passes, because they gather the weights from all ranks.
                    passes = max(len(job.batches) for job in of_round)
                    found = self._run(of_round[min(ranks.rank, len(of_round) - 1)], passes)
                    if ranks.rank < len(of_round):
                        for slot, value in found:
                            scores[slot] = value
        dist.all_reduce(scores)  # one rank computed each score, and the others have 0 there
        known = scores.cpu().numpy()
        return [np.array([known[list(of_target)].mean() for of_target in of_question]) for of_question in slots]

    def _eagerly(self) -> AbstractContextManager[Any]:
        """Rows have many lengths, and compiled blocks would be compiled again for each."""
        return torch.compiler.set_stance("force_eager") if self.passes.config.training.compile else nullcontext()

    # ---- planning -------------------------------------------------------------------------------------------

    def _rows(self, questions: Sequence[Question]) -> tuple[list[list[_Row]], list[list[list[int]]]]:
        """(the rows of each question; for each of its targets the slots of its rows). Equal targets share rows, so
        that their scores are equal to the last bit."""
        rows: list[list[_Row]] = []
        slots: list[list[list[int]]] = []
        slot = 0
        for question in questions:
            rows.append([])
            slots.append([])
            known: dict[tuple[Any, ...], list[int]] = {}
            for target in question.targets:
                values = target.values
                key = (target.modality, target.grid, values.dtype.str, values.shape, values.tobytes())
                if key not in known:
                    draws = self.draws if target.latent else 1
                    rows[-1] += [self._row(question.before, target, draw, slot + draw) for draw in range(draws)]
                    known[key] = list(range(slot, slot + draws))
                    slot += draws
                slots[-1].append(known[key])
        return rows, slots

    def _row(self, before: Sequence[TokenSegment], target: TokenSegment, draw: int, slot: int) -> _Row:
        ids, modality, pictures = assemble_document([*before, target], self.vocab.modalities, self.vocab)
        end = len(ids) - 1 - (target.modality != 0)  # without <eos> and the closing bracket
        kept = [(at, patches, -1) for at, patches, _ in pictures]
        if target.latent:
            kept[-1] = (*kept[-1][:2], draw)
        return _Row(ids[:end], modality[:end], end - len(target.values), tuple(kept), target.latent, slot)

    def _jobs(self, rows: Sequence[Sequence[_Row]]) -> tuple[list[_Job], list[_Job]]:
        """(batches of rows that have nothing in common, groups of rows that continue a common beginning)."""
        alone: list[_Row] = []
        groups: list[_Job] = []
        for some in rows:
            # The last position before the target is read with it, because it predicts the target's first unit.
            common = some[0].first - 1 if some else 0
            if len(some) > 1 and common > 1:
                batches = self._batches([row.part(common, len(row.ids)) for row in some])
                groups.append(_Job(batches, some[0].part(0, common)))
            else:
                alone += some
        return [_Job((batch,)) for batch in self._batches(alone)], groups

    def _batches(self, rows: Sequence[_Row]) -> tuple[tuple[_Row, ...], ...]:
        """The rows in batches of about equal length, the longest first, each of at most `positions` positions."""
        ordered = sorted(rows, key=lambda row: (-len(row.ids), row.slot))
        batches, at = [], 0
        while at < len(ordered):
            n = max(1, self.positions // len(ordered[at].ids))
            batches.append(tuple(ordered[at : at + n]))
            at += n
        return tuple(batches)

    # ---- computing ------------------------------------------------------------------------------------------

    def _run(self, job: _Job, passes: int) -> list[tuple[int, Tensor]]:
        """(slot, score) of each row of a job. Runs a pass over the beginning, if there is one, and `passes` more."""
        state: LayerStates | None = None
        past = 0
        if job.beginning is not None:
            state, past = self.passes.model.empty_state(1), len(job.beginning.ids)
            self._forward([job.beginning], state, 0)
        found: list[tuple[int, Tensor]] = []
        for k in range(passes):
            batch = job.batches[min(k, len(job.batches) - 1)]
            copies = None if state is None else [_for_rows(of_layer, len(batch)) for of_layer in state]
            results = self._forward(batch, copies, past)
            if k < len(job.batches):
                found += [(row.slot, value) for row, value in zip(batch, results, strict=True)]
        return found

    def _forward(self, rows: Sequence[_Row], state: LayerStates | None, past: int) -> Tensor:
        """The score of each row, (B,) float64. `past` positions of the rows' documents are in the state already."""
        B, L = len(rows), max(len(row.ids) for row in rows)
        tokens_BL = torch.full((B, L), self.vocab.specials["pad"])
        modality_BL = torch.zeros(B, L, dtype=torch.uint8)
        document_BL = torch.ones(B, L, dtype=torch.int32)
        labels_BL = torch.full((B, L), IGNORE)
        for b, row in enumerate(rows):
            n = len(row.ids)
            tokens_BL[b, :n] = torch.from_numpy(row.ids)
            modality_BL[b, :n] = torch.from_numpy(row.modality)
            document_BL[b, :n] = 0
            if not row.latent:
                labels_BL[b, row.first - 1 : n - 1] = tokens_BL[b, row.first : n]
        picture_BL, patches = self._patches(rows, L)
        layout = RowLayout.sort(
            modality_BL.to(self.device),
            document_BL.to(self.device),
            len(self.vocab.modalities),
            past_B=torch.full((B,), past, device=self.device) if past else None,
            picture_BL=None if picture_BL is None else picture_BL.to(self.device),
        )
        order = layout.order.long()
        if patches is not None:
            patches = NoisedPatches(*(value.to(self.device) for value in vars(patches).values()))
            patches = replace(patches, row=order[patches.row])
        tokens_T, labels_T = (t.to(self.device).reshape(-1)[layout.rows] for t in (tokens_BL, labels_BL))
        with self.passes.autocast():
            losses = self.passes.model(tokens_T, layout, labels_T, patches, state)
        assert isinstance(losses, Losses)
        nats_B = losses.tokens_T[order].view(B, L).sum(1, dtype=torch.float64)  # 0 where there is no label
        if patches is None or self.diffusion is None:
            return -nats_B
        return -nats_B - self._errors(rows, losses.patches_P)

    def _patches(self, rows: Sequence[_Row], L: int) -> tuple[Tensor | None, NoisedPatches | None]:
        """(the number of the picture at each position (B, L), the patches with the positions in time order as rows), or
        nothing for a model without latents."""
        if (diffusion := self.diffusion) is None:
            return None, None
        W = diffusion.patch_width
        picture_BL = torch.full((len(rows), L), -1, dtype=torch.int32)
        x, target = [torch.zeros(0, W)], [torch.zeros(0, W)]
        places, numbers = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int32)]
        timesteps = [torch.zeros(0, dtype=torch.float32 if diffusion.shifted else torch.int64)]
        for b, row in enumerate(rows):
            for at, values, draw in row.pictures:
                P, number = len(values), len(timesteps) - 1
                picture_BL[b, at : at + P] = number
                # Where patches hold means and log-variances, the means are taken.
                latents_PW = torch.from_numpy(np.asarray(values[:, :W], np.float32))
                t, noisy_PW, goal_PW = self._noised(latents_PW, draw, diffusion)
                timesteps.append(t)
                x.append(noisy_PW)
                target.append(goal_PW)
                places.append(b * L + at + torch.arange(P))
                numbers.append(torch.full((P,), number, dtype=torch.int32))
        return picture_BL, NoisedPatches(
            torch.cat(x), torch.cat(target), torch.cat(places), torch.cat(numbers), torch.cat(timesteps)
        )

    def _noised(self, latents_PW: Tensor, draw: int, diffusion: DiffusionConfig) -> tuple[Tensor, Tensor, Tensor]:
        """(timestep (1,) that the model is told, patches, what is to be predicted) of one picture; draw -1 leaves it
        clean.

        The timesteps of the draws are the middles of equal parts of all timesteps. The noise depends on the draw and on
        the number of patches alone.
        """
        timestep_I = torch.tensor([int((max(draw, 0) + 0.5) * diffusion.steps / self.draws)])
        picture_P = torch.zeros(len(latents_PW), dtype=torch.int64)
        said_I = told(diffusion, timestep_I, picture_P)
        if draw < 0:
            clean_PW = (latents_PW - (diffusion.latent_shift or 0.0)) * (diffusion.latent_scale or 1.0)
            return torch.zeros_like(said_I), clean_PW, clean_PW
        generator = torch.Generator().manual_seed(_SEED + draw)
        epsilon_PW = torch.randn(latents_PW.shape, generator=generator)
        return said_I, *noise(latents_PW, picture_P, timestep_I, epsilon_PW, diffusion)

    def _errors(self, rows: Sequence[_Row], squares_P: Tensor) -> Tensor:
        """The squared error per channel of each row's latent target, (B,) float64; 0 where it has none."""
        assert self.diffusion is not None
        errors, at = [], 0
        for row in rows:
            error = squares_P.new_zeros((), dtype=torch.float64)
            for _, values, draw in row.pictures:
                if draw >= 0:
                    error = squares_P[at : at + len(values)].double().mean() / self.diffusion.patch_width
                at += len(values)
            errors.append(error)
        return torch.stack(errors)


def _for_rows(state: MambaState | AttentionState, rows: int) -> MambaState | AttentionState:
    """A copy of the state of one row for each of `rows` rows."""
    return type(state)(*(t.expand(rows, *t.shape[1:]).contiguous() for t in vars(state).values()))
