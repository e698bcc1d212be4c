"""Detects bad steps, skips their updates, and goes back to a checkpoint after too many of them.

A step is judged on the device, without waiting for it, from values that are equal on all ranks, so all ranks agree.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mom_data.batches.batch import PackedBatch
from mom_data.order.plan import Lane, Plan
from mom_tokenizers.errors import user_path
from mom_train.checkpoint.saver import Checkpointer
from mom_train.checkpoint.store import Checkpoint
from mom_train.config.run import AnomalyConfig, RunConfig
from mom_train.distributed.ranks import Ranks, agreed
from mom_train.model.objective import names_of_sums

log = logging.getLogger(__name__)
_ENOUGH = 16  # number of good steps that are needed before a spike can be recognised


class Judge:
    """Decides which steps are bad: those whose loss or gradient norm is not finite, or exceeds `loss_spike` or
    `grad_norm_spike` times its median over the last `window` good steps."""

    def __init__(self, config: AnomalyConfig, device: torch.device):
        limits = (config.loss_spike or math.inf, config.grad_norm_spike or math.inf)
        self._limits = torch.tensor(limits, dtype=torch.float64, device=device)
        self._recent = torch.full((config.window, 2), math.nan, dtype=torch.float64, device=device)
        self._good = torch.zeros((), dtype=torch.int64, device=device)  # number of rows of `_recent` that are filled
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """Number of bad steps so far."""

    def bad(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether a step is bad, as a bool scalar on the device. A good step is added to those that medians are taken
        over. `loss` and `grad_norm` are scalars that are equal on all ranks."""
        now = torch.stack([loss.double(), grad_norm.double()])
        known = self._good
        middle = ((known - 1).clamp(min=0) // 2).view(1)  # for index_select: plain indexing would wait for its value
        median = self._recent.sort(0).values.index_select(0, middle).squeeze(0)  # nan sorts last
        spike = (now > self._limits * median) & (known >= _ENOUGH)
        bad = (~now.isfinite() | spike).any()
        self._recent = torch.where(bad, self._recent, torch.cat([self._recent[1:], now[None]]))
        self._good = (known + ~bad).clamp(max=len(self._recent))
        self.skipped = self.skipped + bad
        return bad

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values, with None in place of NaN."""
        recent = [[None if math.isnan(x) else x for x in row] for row in self._recent.tolist()]
        return {"recent": recent, "good": int(self._good), "skipped": int(self.skipped)}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Takes over a state, also one with another `window`: the last good steps that fit are kept."""
        rows = [[math.nan if x is None else x for x in row] for row in values["recent"]]
        window = len(self._recent)
        rows = [[math.nan, math.nan]] * window + rows
        self._recent.copy_(torch.tensor(rows[-window:], dtype=torch.float64))
        self._good.fill_(min(values["good"], len(values["recent"]), window))
        self.skipped.fill_(values["skipped"])


class BadSteps:
    """Handles bad steps: logs what was bad about them and, after too many in a row, takes the run back to a checkpoint.

    RUN/rollbacks.jsonl records which step the run went back to and which data it left out, so that it leaves out the
    same data if it is started again from there. All ranks must call every method alike.
    """

    def __init__(self, config: RunConfig, plan: Plan, ranks: Ranks):
        self._config, self._plan, self._ranks = config, plan, ranks
        self._in_a_row: list[dict[str, Any]] = []
        self._noted: tuple[int, Tensor, Tensor, Sequence[PackedBatch]] | None = None
        self._known: torch.cuda.Event | None = None  # reached once the noted verdict is on the host
        self._path = config.run_dir / "rollbacks.jsonl"

    def note(self, step: int, bad: Tensor, sums: Tensor, step_batches: Sequence[PackedBatch]) -> None:
        """Remembers a step until it is known whether it is `bad`. `sums` (S,) are the loss sums of this rank."""
        self._noted = step, bad.to("cpu", non_blocking=True), sums, step_batches
        if sums.is_cuda:
            self._known = torch.cuda.Event()
            self._known.record()

    @property
    def last_was_bad(self) -> bool:
        """Whether the last step that `stay_bad` looked at was bad."""
        return bool(self._in_a_row)

    def stay_bad(self) -> bool:
        """Looks at the verdict on the noted step. Returns whether too many steps in a row have been bad."""
        if self._noted is None:
            return False
        (step, bad, sums, step_batches), self._noted = self._noted, None
        if self._known is not None:
            self._known.synchronize()  # the stream itself already has the passes of the next step
        if not bad:
            self._in_a_row.clear()
            return False
        everyone: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(everyone, (sums.tolist(), self._documents(step_batches)))
        named = self._describe(step, everyone)
        self._in_a_row.append(named)
        odd = [
            f"{', '.join(r['not_finite'])} not finite on rank {r['rank']}" for r in named["ranks"] if r["not_finite"]
        ]
        why = "; ".join(odd) or "its gradient norm is not finite, or its gradient norm or loss is too large"
        log.warning("BAD STEP %d, its update is skipped: %s", step, why)
        return len(self._in_a_row) >= self._config.anomaly.skips

    def _describe(self, step: int, everyone: Sequence[Any]) -> dict[str, Any]:
        names = names_of_sums(self._config)
        ranks = []
        for rank, (sums, documents) in enumerate(everyone):
            odd = [name for name, value in zip(names, sums, strict=True) if not math.isfinite(value)]
            losses = {name: repr(value) for name, value in zip(names, sums, strict=True)}
            ranks.append({"rank": rank, "not_finite": odd, "loss_sums": losses, "documents": documents})
        return {"step": step, "ranks": ranks}

    def _documents(self, step_batches: Sequence[PackedBatch]) -> list[str]:
        """Names of the documents in the rows of the batches, found by planning these rows again."""
        found: dict[str, None] = {}
        for batch in step_batches:
            for sequence in batch.sequences.tolist():
                number, given = sequence % self._plan.lanes, sequence // self._plan.lanes
                cursor = batch.cursors.get(number)
                lane = Lane(self._plan, number, cursor)
                if lane.given > given:  # the row comes before the one that the cursor belongs to
                    lane = Lane(self._plan, number)
                lane.skip_to(given)
                for piece in next(lane):
                    dataset = self._plan.sources[piece.source].dataset
                    found[f"{dataset.location}/{dataset.shards[piece.shard]['name']}#{piece.document}"] = None
        return list(found)

    def behind(self, step: int, sequence: int) -> int:
        """The sequence with which a run continues from the checkpoint of `step`, which was made at `sequence`: after
        the data that was left out when the run went back to that checkpoint."""
        return max([sequence, *(r["sequence"] for r in self._rollbacks() if r["step"] == step)])

    def _rollbacks(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text().split("\n")[:-1]]

    def roll_back(self, checkpointer: Checkpointer, sequence: int) -> Checkpoint | None:
        """The checkpoint from which the run continues with the data from `sequence` on. None if going back does not
        help any more; RUN/incident.json then says what happened."""
        bad, self._in_a_row = self._in_a_row, []
        checkpointer.wait()
        target = checkpointer.newest(below=bad[0]["step"])
        earlier = 0 if target is None else sum(r["step"] >= target.step for r in agreed(self._rollbacks))
        if target is None or earlier >= self._config.anomaly.rollbacks:
            why = (
                "there is no checkpoint before them" if target is None else f"the run went back {earlier} times already"
            )
            agreed(partial(self._write_incident, bad, why))
            return None
        agreed(partial(self._write_rollback, target.step, sequence, bad))
        checkpointer.fall_back(target)
        log.warning("%d bad steps in a row: back to step %d, then sequence %d", len(bad), target.step, sequence)
        return target

    def _write_rollback(self, step: int, sequence: int, bad: list[dict[str, Any]]) -> None:
        if not self._ranks.main:
            return
        with user_path(self._path), open(self._path, "a") as file:
            file.write(json.dumps({"step": step, "sequence": sequence, "bad": bad}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _write_incident(self, bad: list[dict[str, Any]], why: str) -> None:
        path = self._config.run_dir / "incident.json"
        log.error("steps %d to %d are bad, and %s: the run ends. See %s", bad[0]["step"], bad[-1]["step"], why, path)
        if self._ranks.main:
            with user_path(path):
                path.write_text(json.dumps({"why": why, "bad": bad, "rollbacks": self._rollbacks()}, indent=1) + "\n")
