"""Checkpoints: sharded by torch DCP, committed last, found through LATEST.

    RUN/checkpoints/step-N/     DCP's files and train_state.json; DCP writes `.metadata` last, the mark of a commit
    RUN/LATEST                  the name of the newest committed one, replaced atomically

A directory without `.metadata` is a save that did not finish: it is ignored, and removed by the next save.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mom_train.model import LanguageModel


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
    config: dict[str, Any] | None = None
    """The resolved config."""
    version: str = ""
    """Of this package."""

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, values: dict[str, Any]) -> None:
        vars(self).update(values)


def latest(run_dir: Path) -> Path | None:
    """The newest committed checkpoint, or None. Raises ValueError where LATEST names one that is not there."""
    pointer = run_dir / "LATEST"
    if not pointer.exists():
        return None
    path = run_dir / "checkpoints" / pointer.read_text().strip()
    if not (path / ".metadata").is_file():
        others = sorted(p.parent.name for p in (run_dir / "checkpoints").glob("*/.metadata"))
        raise ValueError(
            f"{pointer} names {path.name}, which is not a committed checkpoint. "
            + (f"Committed: {', '.join(others)}; write one of these names into it." if others else "None is committed.")
        )
    return path


def read_train_state(path: Path) -> TrainState:
    state = TrainState()
    state.load_state_dict(json.loads((path / "train_state.json").read_text()))
    return state


def save(run_dir: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, state: TrainState, keep: int) -> Path:
    """Save on all ranks, commit, then drop all but the newest `keep`."""
    path = run_dir / "checkpoints" / f"step-{state.step}"
    main = dist.get_rank() == 0
    if main:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        (path / "train_state.json").write_text(json.dumps(state.state_dict(), indent=1) + "\n")
    dist.barrier()
    tensors, optimizer_tensors = get_state_dict(model, optimizer)
    dcp.save({"model": tensors, "optimizer": optimizer_tensors}, checkpoint_id=str(path))
    if main:
        pointer = run_dir / "LATEST"
        partial = pointer.with_name(".LATEST.partial")
        partial.write_text(path.name + "\n")
        partial.rename(pointer)
        _prune(run_dir / "checkpoints", keep)
    return path


def load(path: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimiser in place, resharding as needed."""
    tensors, optimizer_tensors = get_state_dict(model, optimizer)
    values: dict[str, Any] = {"model": tensors, "optimizer": optimizer_tensors}
    dcp.load(values, checkpoint_id=str(path))
    set_state_dict(model, optimizer, model_state_dict=values["model"], optim_state_dict=values["optimizer"])


def _prune(folder: Path, keep: int) -> None:
    committed = sorted((p for p in folder.iterdir() if (p / ".metadata").is_file()), key=_step)
    unfinished = [p for p in folder.iterdir() if p.is_dir() and not (p / ".metadata").is_file()]
    for path in [*committed[:-keep], *unfinished]:
        # the mark goes first: a removal that is interrupted must not leave something that looks whole
        (path / ".metadata").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
