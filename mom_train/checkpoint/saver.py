"""Saving while training goes on, and loading what verifies.

A save copies the tensors to host memory in a background thread, which must be done before the next optimiser step
changes them (`staged`), and writes them from there while training goes on. The thread's collectives have a gloo group
of their own. Layout and safety of what is written: mom_train/checkpoint/store.py.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mom_data.order.plan import Cursor
from mom_tokenizers.errors import AgreedError, UserError
from mom_train.checkpoint.store import Checkpoint, Checkpoints
from mom_train.config.migrations import SCHEMA
from mom_train.config.run import CheckpointConfig
from mom_train.distributed.ranks import CHECKPOINT_GROUP, agreed
from mom_train.model.language_model import LanguageModel
from mom_train.optim.ema import Ema

log = logging.getLogger(__name__)
_LONGEST_WRITE = timedelta(hours=2)  # ranks wait for the slowest one's files


@dataclass
class TrainState:
    """Everything of a run that is not a tensor. The order of the data follows from `sequence` alone; every random
    draw follows from the seed and a name, so no generator's state is kept."""

    step: int = 0
    """Optimiser steps done."""
    sequence: int = 0
    """Packed sequences consumed, over all ranks."""
    tokens: dict[str, int] | None = None
    """Real input tokens trained on, by modality."""
    flops: int = 0
    """Training FLOPs spent."""
    data_fingerprint: str = ""
    """Of the plan that `sequence` counts in."""
    phases: list[dict[str, Any]] = field(default_factory=list)
    """Of that plan: since which sequence, and its sources and packing."""
    lanes: dict[str, Cursor] = field(default_factory=dict)
    """Lane -> cursor at or before `sequence`, so that nothing before has to be planned again."""
    judge: dict[str, Any] = field(default_factory=dict)
    """What steps are judged by (mom_train/anomaly.py)."""
    validated: int = -1
    """The last step whose validation was not interrupted."""
    best: dict[str, Any] = field(default_factory=dict)
    """`figure`, `step` and `value` of the best checkpoint so far, where checkpoint.best names a figure."""
    config: dict[str, Any] | None = None
    """The resolved config."""
    version: str = ""
    """Of this package."""

    def state_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **vars(self)}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take what `Checkpoint.train_state` gives; what is new since it was saved keeps its default."""
        vars(self).update(values)
        self.lanes = {lane: Cursor(*cursor) for lane, cursor in self.lanes.items()}


def read_train_state(checkpoint: Checkpoint) -> TrainState:
    state = TrainState()
    state.load_state_dict(checkpoint.train_state())
    return state


def tensors(model: LanguageModel, optimizer: torch.optim.Optimizer, ema: Ema | None) -> dict[str, Any]:
    """What a checkpoint holds, by name: aliases, not copies. The optimiser's hyperparameters are the config's and stay
    out, so that every value is a tensor."""
    weights, of_optimizer = get_state_dict(model, optimizer)
    values = {"model": weights, "optimizer": {"state": of_optimizer["state"]}}
    return values if ema is None else values | {"ema": ema.average}


class HostCopies:
    """Copies tensors to host memory in a background thread, into memory that is kept from save to save and, with CUDA,
    pinned.

    This is what torch's DefaultStager does, too, but that of torch 2.11 closes its StateDictStager after every copy, so
    that it serves only once.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._thread = ThreadPoolExecutor(1, "checkpoint-copy")
        self._stream = torch.cuda.Stream() if self._cuda else None
        self._stager = self._new_stager()

    def _new_stager(self) -> StateDictStager:
        return StateDictStager(pin_memory=self._cuda)

    def begin(self, values: dict[str, Any]) -> Future[dict[str, Any]]:
        """The copy of a nested dict of tensors as they are once what has been launched on the device is done. The
        tensors must not change before the future is done."""
        launched = torch.cuda.current_stream().record_event() if self._stream is not None else None
        return self._thread.submit(self._copy, values, launched)

    def _copy(self, values: dict[str, Any], launched: torch.cuda.Event | None) -> dict[str, Any]:
        try:
            if self._stream is None or launched is None:
                on_host: dict[str, Any] = self._stager.stage(values)
                return on_host
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(launched)
                copied: dict[str, Any] = self._stager.stage(values, non_blocking=True)
            self._stream.synchronize()
            return copied
        except Exception:
            self._stager = self._new_stager()  # so that one failure is not the next one's cause
            raise

    def close(self) -> None:
        self._thread.shutdown()
        self._stager.close()


class Checkpointer:
    """A run's checkpoints while it trains: one save at a time, in the background. A context manager.

    Every method is to be called on all ranks alike. `finished` and `time_is_up` are one rank's view; the ranks agree on
    them together with what else they agree on before a step, and `settle` then tells all of them at the same step how
    the save went.
    """

    def __init__(self, checkpoints: Checkpoints, config: CheckpointConfig):
        self.checkpoints, self.config = checkpoints, config
        self.committed_step = 0
        """Of the newest that this run committed or began from."""
        self.stall = 0.0
        """Seconds that the last save kept training waiting."""
        self.best: dict[str, Any] = {}
        """Of `TrainState.best`: the best checkpoint that is committed, or being written."""
        self._saving: dict[str, Any] = {}  # the best one as the save that is being written knows it
        self._saved: dict[str, Any] = {}  # and as the last one that was committed does
        self._group = dist.new_group(backend="gloo", timeout=_LONGEST_WRITE, group_desc=CHECKPOINT_GROUP)
        self._copies = HostCopies()
        self._copied: Future[dict[str, Any]] | None = None  # a copy that the optimiser must wait for
        self._thread: threading.Thread | None = None
        self._step, self._error, self._mendable, self._failures = 0, "", False, 0
        self._last = time.monotonic()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:  # also where the run fails: what can be committed is
            self._thread.join()
        self._copies.close()

    # ---- at the start -------------------------------------------------------------------------------------

    def newest(self, below: int | None = None) -> Checkpoint | None:
        """The newest checkpoint, of those before step `below` if given, whose checksums verify, or None where there is
        no checkpoint; the ranks share the reading. Damaged ones are marked, so that they do not count as one, and
        LATEST is set back.

        Raises ValueError where there are checkpoints and none verifies.
        """
        steps = [agreed(partial(self._candidates, below))]
        dist.broadcast_object_list(steps)
        damaged: list[str] = []
        for checkpoint in (self.checkpoints[step] for step in steps[0]):
            found: list[list[str]] = [[]] * dist.get_world_size()
            dist.all_gather_object(found, agreed(partial(checkpoint.damage, dist.get_rank(), dist.get_world_size())))
            lines = sorted({line for of_rank in found for line in of_rank})
            if not lines:
                if damaged:
                    log.warning("carrying on from %s, an older checkpoint", checkpoint)
                    self.fall_back(checkpoint)
                return checkpoint
            log.warning("DAMAGED CHECKPOINT %s: %s", checkpoint, "; ".join(lines))
            damaged += lines
        if damaged:
            raise AgreedError(
                f"no checkpoint in {self.checkpoints.root} verifies: {'; '.join(damaged)}. Restore these files, or "
                "remove that folder's checkpoints and LATEST to train from the start."
            )
        return None

    def _candidates(self, below: int | None) -> list[int]:
        if dist.get_rank() != 0:
            return []
        latest = self.checkpoints.latest()
        for removed in self.checkpoints.clean():
            log.warning("removed %s, a save that did not finish", removed)
        if latest is None:
            return []
        return [
            c.step
            for c in reversed(self.checkpoints.committed())
            if c.step <= latest.step and (below is None or c.step < below)
        ]

    def fall_back(self, to: Checkpoint) -> None:
        """Set LATEST back to `to`, and mark those after it so that they are never carried on from."""
        agreed(partial(self._mark_after, to))

    def _mark_after(self, to: Checkpoint) -> None:
        if dist.get_rank() == 0:
            self.checkpoints.point(to)
            for checkpoint in self.checkpoints.committed():
                if checkpoint.step > to.step:
                    checkpoint.mark_damaged()

    def restore_best(self, best: dict[str, Any]) -> None:
        """Take up the best checkpoint that a train state knows of, where it is still there and of the figure that
        `checkpoint.best` names; else none is the best so far."""
        found = [agreed(partial(self._point_at_best, best))]
        dist.broadcast_object_list(found)
        self.best = self._saving = self._saved = found[0]

    def _point_at_best(self, best: dict[str, Any]) -> dict[str, Any]:
        if dist.get_rank() != 0:
            return {}
        same = best and self.config.best in (None, best["figure"])
        there = same and self.checkpoints[best["step"]].committed
        self.checkpoints.point_at_best(self.checkpoints[best["step"]] if there else None)
        return best if there else {}

    def mark_best(self) -> None:
        """BEST names the checkpoint that the run stands at, which is committed."""
        agreed(partial(self._point_at_best, self.best))
        self._saving = self._saved = self.best

    def improves(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether a validation's `values`, equal on all ranks, are the best so far: then the state after `step` is to
        be saved. Raises ValueError where they lack the figure of `checkpoint.best`."""
        figure = self.config.best
        if figure is None or not values:
            return False
        if figure not in values:
            raise AgreedError(f"checkpoint.best={figure}: the validation has no such figure, only {', '.join(values)}")
        value = values[figure]
        if not value < self.best.get("value", math.inf):  # also where it is not a number
            return False
        self.best = {"figure": figure, "step": step, "value": value}
        return True

    def load(
        self, checkpoint: Checkpoint, model: LanguageModel, optimizer: torch.optim.Optimizer, ema: Ema | None
    ) -> None:
        """Fill model, optimiser and average in place, resharding as needed."""
        metadata = agreed(checkpoint.metadata)
        averaged = any(name.startswith("ema.") for name in metadata.state_dict_metadata)
        values = tensors(model, optimizer, ema if averaged else None)
        checkpoint.load(values)
        groups = {"param_groups": get_state_dict(model, optimizer)[1]["param_groups"]}
        set_state_dict(
            model, optimizer, model_state_dict=values["model"], optim_state_dict=values["optimizer"] | groups
        )
        if ema is not None and not averaged:
            log.warning("%s holds no average of the weights: training.ema_decay starts from its weights", checkpoint)
            ema.restart()
        self.committed_step = checkpoint.step

    # ---- while training -----------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        return any(every and step % every == 0 for every in (self.config.every, self.config.keep_every))

    @property
    def time_is_up(self) -> bool:
        """Whether `seconds` have passed since the last save began, and none is being written."""
        seconds = self.config.seconds
        return seconds is not None and self._thread is None and time.monotonic() - self._last >= seconds

    @property
    def finished(self) -> bool:
        """Whether this rank has done its part of the save, or has none."""
        return self._thread is None or not self._thread.is_alive()

    def save(
        self, model: LanguageModel, optimizer: torch.optim.Optimizer, ema: Ema | None, train_state: TrainState
    ) -> None:
        """Begin. The weights must not change before `staged`. Waits for a save that is still being written.

        Raises ValueError as `settle` where that one failed once too often.
        """
        begun = time.perf_counter()
        self.wait()
        self._last, self._step, self._error, self._mendable = time.monotonic(), train_state.step, "", False
        self._saving = train_state.best = self.best
        text = json.dumps(train_state.state_dict(), indent=1) + "\n"
        self._copied = self._copies.begin(tensors(model, optimizer, ema))
        self._thread = threading.Thread(target=self._write, args=(self._copied, text), daemon=True, name="checkpoint")
        self._thread.start()
        self.stall = time.perf_counter() - begun

    def staged(self) -> None:
        """Wait until the optimiser may change the weights. A copy that failed is a save that failed: see `settle`."""
        if self._copied is not None:
            begun = time.perf_counter()
            self._copied.exception()
            self._copied = None
            self.stall += time.perf_counter() - begun

    def settle(self) -> None:
        """Take note of how the save ended that all ranks have finished.

        Where it failed and `max_failures` were reached in a row, raises AgreedError if the last one failed for what the
        user can mend, such as a full disk, else RuntimeError: starting again may then help.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if not self._error:
            self.committed_step, self._failures = self._step, 0
            self._saved = self._saving
            return
        if self.best == self._saving:
            self.best = self._saved
        self._failures += 1
        log.error("CHECKPOINT FAILED at step %d, LATEST stays as it was: %s", self._step, self._error)
        if self._failures >= self.config.max_failures:
            raise (AgreedError if self._mendable else RuntimeError)(
                f"{self._failures} checkpoints in a row could not be written (checkpoint.max_failures="
                f"{self.config.max_failures}), the last because of {self._error}. The newest committed one is of step "
                f"{self.committed_step}; the run carries on from there when started again."
            )

    def wait(self) -> None:
        """Until the save is committed or has failed; then as `settle`."""
        self.staged()
        self.settle()

    def _write(self, copied: Future[dict[str, Any]], train_state: str) -> None:
        try:
            # agreed before the write's first collective, in which the others would wait for a rank without a copy
            failures: list[str | None] = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(failures, _described(copied.exception()), group=self._group)
            for rank, failure in enumerate(failures):
                if failure is not None:
                    self._error = f"[rank {rank}] its tensors could not be copied to host memory: {failure}"
                    return
            self.checkpoints.write(self._step, copied.result(), train_state, self._group)
        except Exception as error:
            self._error, self._mendable = _described(error) or "", isinstance(error, UserError)
            return
        if dist.get_rank() == 0:
            try:
                if self._saving.get("step") == self._step:
                    self.checkpoints.point_at_best(self.checkpoints[self._step])
                self.checkpoints.prune(self._step, self.config.keep, self.config.keep_every)
            except Exception as error:  # of an object store's client, too: the save itself is committed
                log.warning("BEST could not be written, or older checkpoints removed: %s", error)


def _described(error: BaseException | None) -> str | None:
    """An exception in words; one that is not meant for users with its type, which may be all that it says."""
    if error is None or isinstance(error, UserError):
        return None if error is None else str(error)
    return f"{type(error).__name__}: {error}"
