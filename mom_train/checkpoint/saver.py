"""Saves checkpoints while training goes on, and loads checkpoints whose checksums verify.

A background thread copies the tensors to host memory. This must be finished before the next optimiser step changes them
(`staged`). The thread then writes the copies while training goes on. Its collective operations use a gloo group of
their own. mom_train/checkpoint/store.py explains the layout of a checkpoint and why loading one is safe.
"""

from __future__ import annotations

import importlib.metadata
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
from mom_train.config.run import CheckpointConfig, RunConfig
from mom_train.distributed.ranks import CHECKPOINT_GROUP, agreed
from mom_train.model.language_model import LanguageModel
from mom_train.optim.ema import Ema

log = logging.getLogger(__name__)
_LONGEST_WRITE = timedelta(hours=2)  # ranks wait for the slowest one to write its files


@dataclass
class TrainState:
    """All state of a run that is not a tensor.

    The position in the data follows from `sequence` alone. Every random draw follows from the seed and a name, so no
    state of a generator is kept.
    """

    step: int = 0
    """Number of optimiser steps done."""
    sequence: int = 0
    """Number of packed sequences consumed, over all ranks."""
    tokens: dict[str, int] | None = None
    """Number of input tokens trained on by modality, without padding."""
    flops: int = 0
    """Number of training FLOPs spent."""
    data_fingerprint: str = ""
    """Fingerprint of the plan that `sequence` is a position in."""
    phases: list[dict[str, Any]] = field(default_factory=list)
    """Phases of that plan: for each, its first sequence, its sources and its packing."""
    lanes: dict[str, Cursor] = field(default_factory=dict)
    """For each lane, a cursor at or before `sequence`, so that nothing before it has to be planned again."""
    judge: dict[str, Any] = field(default_factory=dict)
    """State of the judge of bad steps (mom_train/anomaly.py)."""
    validated: int = -1
    """Last step after which validation was completed; -1 if there was none."""
    best: dict[str, Any] = field(default_factory=dict)
    """`figure`, `step` and `value` of the best checkpoint so far, if checkpoint.best names a figure."""
    averaged: dict[str, Any] = field(default_factory=dict)
    """`steps`, `weights` and place (`of`) of the checkpoints whose mean this is, or nothing if a run made it itself."""
    config: dict[str, Any] | None = None
    """The resolved config."""
    version: str = ""
    """Version of this package."""

    @classmethod
    def begin(cls, config: RunConfig, data_fingerprint: str, phases: list[dict[str, Any]]) -> TrainState:
        """The state before the first step."""
        return cls(
            tokens=dict.fromkeys(config.layout.modalities, 0),
            data_fingerprint=data_fingerprint,
            phases=phases,
            config=config.model_dump(mode="json"),
            version=importlib.metadata.version("mixture-of-mamba"),
        )

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values, preceded by the number of their schema."""
        return {"schema": SCHEMA, **vars(self)}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Takes over what `Checkpoint.train_state` returns. Fields that are newer than the checkpoint keep their
        defaults."""
        vars(self).update(values)
        self.lanes = {lane: Cursor(*cursor) for lane, cursor in self.lanes.items()}


def read_train_state(checkpoint: Checkpoint) -> TrainState:
    """The train state in `checkpoint`. Raises UserError if it cannot be read."""
    state = TrainState()
    state.load_state_dict(checkpoint.train_state())
    return state


def read_to_continue(checkpoint: Checkpoint) -> TrainState:
    """The same for a run that continues from there. Raises UserError also if it is an average of checkpoints."""
    state = read_train_state(checkpoint)
    if state.averaged:
        raise UserError(
            f"{checkpoint} is an average of checkpoints and has no state of an optimiser, so a run cannot continue "
            "from it: start a new run with init_from, or continue the run that was averaged"
        )
    return state


def tensors(model: LanguageModel, optimizer: torch.optim.Optimizer, ema: Ema | None) -> dict[str, Any]:
    """The tensors that a checkpoint holds, in nested dicts. They are aliases, not copies.

    The optimiser's hyperparameters are left out because they are in the config, so that every value is a tensor.
    """
    weights, of_optimizer = get_state_dict(model, optimizer)
    values = {"model": weights, "optimizer": {"state": of_optimizer["state"]}}
    return values if ema is None else values | {"ema": ema.average}


class HostCopies:
    """Copies tensors to host memory in a background thread. The memory is reused for every save and, with CUDA, pinned.

    torch's DefaultStager does the same, but in torch 2.11 it closes its StateDictStager after every copy, so that it
    can be used only once.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._thread = ThreadPoolExecutor(1, "checkpoint-copy")
        self._stream = torch.cuda.Stream() if self._cuda else None
        self._stager = self._new_stager()

    def _new_stager(self) -> StateDictStager:
        return StateDictStager(pin_memory=self._cuda)

    def begin(self, values: dict[str, Any]) -> Future[dict[str, Any]]:
        """Begins to copy a nested dict of tensors, with the values they have after all work launched on the device so
        far. The tensors must not be changed before the returned future is done."""
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
            self._stager = self._new_stager()  # so that this failure does not cause the next one
            raise

    def close(self) -> None:
        self._thread.shutdown()
        self._stager.close()


class Checkpointer:
    """Saves and loads the checkpoints of a run while it trains, one save at a time, in the background. A context
    manager.

    All ranks must call every method alike. `finished` and `time_is_up` say how things stand on one rank. The ranks
    agree on them before each step, and `settle` then tells all of them at the same step how the save ended.
    """

    def __init__(self, checkpoints: Checkpoints, config: CheckpointConfig):
        self.checkpoints, self.config = checkpoints, config
        self.committed_step = 0
        """Step of the newest checkpoint that this run committed or started from."""
        self.stall = 0.0
        """Seconds that training had to wait for the last save."""
        self.best: dict[str, Any] = {}
        """The best checkpoint that is committed or being written, as in `TrainState.best`."""
        self._saving: dict[str, Any] = {}  # `best` as of the save that is being written
        self._saved: dict[str, Any] = {}  # `best` as of the last save that was committed
        self._group = dist.new_group(backend="gloo", timeout=_LONGEST_WRITE, group_desc=CHECKPOINT_GROUP)
        self._copies = HostCopies()
        self._copied: Future[dict[str, Any]] | None = None  # a copy that the optimiser must wait for
        self._thread: threading.Thread | None = None
        self._step, self._error, self._mendable, self._failures = 0, "", False, 0
        self._last = time.monotonic()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:  # also if the run fails, so that a save that can be committed is
            self._thread.join()
        self._copies.close()

    # ---- at the start -------------------------------------------------------------------------------------

    def newest(self, below: int | None = None) -> Checkpoint | None:
        """The newest checkpoint whose checksums verify, or None if there is no checkpoint.

        If `below` is given, only checkpoints before that step count. The ranks share the reading. If newer checkpoints
        are damaged, they are marked so that they no longer count, and LATEST is set back. Raises UserError if there are
        checkpoints but none verifies.
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
                    log.warning("continuing from %s, an older checkpoint", checkpoint)
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
        """Sets LATEST back to `to`, and marks later checkpoints so that no run ever continues from them."""
        agreed(partial(self._mark_after, to))

    def _mark_after(self, to: Checkpoint) -> None:
        if dist.get_rank() == 0:
            self.checkpoints.point(to)
            for checkpoint in self.checkpoints.committed():
                if checkpoint.step > to.step:
                    checkpoint.mark_damaged()

    def restore_best(self, best: dict[str, Any]) -> None:
        """Takes over the best checkpoint from a train state if it still exists and belongs to the figure that
        `checkpoint.best` names. Otherwise there is no best checkpoint so far."""
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
        """Makes BEST name the committed checkpoint that the run is at."""
        agreed(partial(self._point_at_best, self.best))
        self._saving = self._saved = self.best

    def improves(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether the `values` of a validation are the best so far, so that the state after `step` should be saved.
        They must be equal on all ranks. Raises UserError if they lack the figure that `checkpoint.best` names."""
        figure = self.config.best
        if figure is None or not values:
            return False
        if figure not in values:
            raise AgreedError(f"checkpoint.best={figure}: validation has no such figure, only {', '.join(values)}")
        value = values[figure]
        if not value < self.best.get("value", math.inf):  # so that NaN is not the best
            return False
        self.best = {"figure": figure, "step": step, "value": value}
        return True

    def load(
        self, checkpoint: Checkpoint, model: LanguageModel, optimizer: torch.optim.Optimizer, ema: Ema | None
    ) -> None:
        """Fills the model, the optimiser and the average of the weights in place, resharding as needed."""
        metadata = agreed(checkpoint.metadata)
        averaged = any(name.startswith("ema.") for name in metadata.state_dict_metadata)
        values = tensors(model, optimizer, ema if averaged else None)
        checkpoint.load(values)
        groups = {"param_groups": get_state_dict(model, optimizer)[1]["param_groups"]}
        set_state_dict(
            model, optimizer, model_state_dict=values["model"], optim_state_dict=values["optimizer"] | groups
        )
        if ema is not None and not averaged:
            log.warning("%s holds no average of the weights: the new one starts from its weights", checkpoint)
            ema.restart()
        self.committed_step = checkpoint.step

    # ---- while training -----------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be made after this step."""
        return any(every and step % every == 0 for every in (self.config.every, self.config.keep_every))

    @property
    def time_is_up(self) -> bool:
        """Whether `checkpoint.seconds` have passed since the last save began, and no save is being written."""
        seconds = self.config.seconds
        return seconds is not None and self._thread is None and time.monotonic() - self._last >= seconds

    @property
    def finished(self) -> bool:
        """Whether this rank has finished its part of the save. True also if no save is being written."""
        return self._thread is None or not self._thread.is_alive()

    def save(
        self, model: LanguageModel, optimizer: torch.optim.Optimizer, ema: Ema | None, train_state: TrainState
    ) -> None:
        """Begins a save. The weights must not change before `staged` has returned.

        Waits first for a save that is still being written, and raises as `settle` does if that one fails.
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
        """Waits until the optimiser may change the weights. If the copy failed, `settle` reports it."""
        if self._copied is not None:
            begun = time.perf_counter()
            self._copied.exception()
            self._copied = None
            self.stall += time.perf_counter() - begun

    def settle(self) -> None:
        """Takes note of how a save ended that all ranks have finished.

        If it is the last of `max_failures` failures in a row, raises an error: AgreedError if the user can mend its
        cause, such as a full disk, or RuntimeError if starting again may help.
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
                f"{self.config.max_failures}), the last because of {self._error}. The newest committed checkpoint is "
                f"of step {self.committed_step}; the run continues from there when it is started again."
            )

    def wait(self) -> None:
        """Waits until the save is committed or has failed, and then does the same as `settle`."""
        self.staged()
        self.settle()

    def _write(self, copied: Future[dict[str, Any]], train_state: str) -> None:
        try:
            # The ranks agree before the first collective of the write, in which they would wait for a failed rank.
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
            except Exception as error:  # any error, also of the client of an object store: the save itself is committed
                log.warning("BEST could not be written, or older checkpoints could not be removed: %s", error)


def _described(error: BaseException | None) -> str | None:
    """An exception in words. Its type is named unless it is a UserError, because the type may be all that it says."""
    if error is None or isinstance(error, UserError):
        return None if error is None else str(error)
    return f"{type(error).__name__}: {error}"
