"""Checks made before torch is imported, which takes seconds: whether the files and folders of a config are there.

Mistakes in the config itself are found by `mom_train.config.files.load_config`. URLs are not checked here but opened
when they are needed. All problems are reported at once, in one UserError.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import TypeVar

from mom_data.shards.dataset import TokenDataset, check_agreement
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import AgreedError, UserError, read_json
from mom_train.config.files import read_saved
from mom_train.config.run import RunConfig

T = TypeVar("T")


def check_places(config: RunConfig, ranks: int | None = None) -> None:
    """Raises UserError if a run cannot begin: because token shards are missing or do not fit the vocabulary, because
    raw documents, tokenizers or weights are not there, because a folder cannot be written, or because `ranks` ranks
    cannot share a batch."""
    problems: list[str] = []
    of_sets = chain(*config.data.validation.values(), *config.evaluation.minimal_pairs.values())
    sources = [*config.data.train, *of_sets]
    datasets = {
        source.path: attempt(problems, lambda path=source.path, shards=source.shards: TokenDataset(path, shards))  # type: ignore[misc]
        for source in sources
        if source.path is not None and is_local(source.path)
    }
    opened = [dataset for dataset in datasets.values() if dataset is not None]
    attempt(problems, lambda: check_agreement(opened, dict(config.layout.sizes), shapes=config.layout.shapes))
    for pattern in dict.fromkeys(chain(*(source.raw for source in sources))):
        if not (Path(pattern).exists() or glob.has_magic(pattern)) and is_local(pattern):
            problems.append(f"{pattern}: no raw documents there (data.*.raw, from {os.getcwd()})")
    if (bundle := config.tokenizers) is not None:
        attempt(problems, lambda: Tokenizers.load(bundle))
    if (weights := config.init_from) is not None and is_local(weights) and not weights.exists():
        problems.append(f"{weights}: nothing there (init_from)")
    if (weights := config.init_from) is not None and config.model.base_dim is not None and is_local(weights):
        attempt(problems, lambda: _check_not_published(weights))
    written = {"run_dir": config.run_dir, "checkpoint.path": config.checkpoint.path, "data.cache": config.data.cache}
    for key, place in written.items():
        if place is not None and is_local(place):
            attempt(problems, lambda key=key, place=place: check_writable(Path(place), key))  # type: ignore[misc]
    of_this_rank = bool(problems)
    if ranks is not None:
        attempt(problems, lambda: config.accumulation(ranks))
    if problems and not of_this_rank:  # the config and the number of ranks are the same on all ranks
        raise AgreedError(problems[0])
    say(problems)


def _check_not_published(weights: Path) -> None:
    """Raises UserError if `weights` are those of a published model, whose initial values no `model.base_dim` scaled.
    What else does not fit is found when they are opened (`mom_train.exchange.weights`)."""
    file = (weights if weights.is_dir() else weights.parent) / "config.json"
    described = read_json(file) if file.is_file() else {}
    if isinstance(described, dict) and described and described.get("model_type") != "mixture_of_mamba":
        raise UserError(
            f"{file}: a published model, and model.base_dim is for models that it has scaled from their first step: "
            "leave model.base_dim out"
        )


def check_run(run: str | Path) -> None:
    """Raises UserError if `run` is neither the folder of a run with checkpoints nor the folder of one checkpoint."""
    if not is_local(run):
        return
    path = Path(run)
    if not path.is_dir():
        raise UserError(f"{run}: no such folder" if not path.exists() else f"{run} is a file, not a run's folder")
    if path.parent.name == "checkpoints" and path.name.startswith("step-"):
        return
    where = read_saved(path).get("checkpoint", {}).get("path") or path
    if is_local(where) and not (Path(where) / "checkpoints").is_dir():
        raise UserError(f"{where}: no checkpoints there. It is not the folder of a run, or the run has saved none yet")


def check_datasets(places: Iterable[str]) -> None:
    """Raises UserError if one of these folders does not hold a complete set of token shards."""
    problems: list[str] = []
    for place in places:
        if is_local(place):
            attempt(problems, lambda place=place: TokenDataset(place))  # type: ignore[misc]
    say(problems)


def check_there(option: str, place: Path | None) -> None:
    """Raises UserError if the file or folder that `option` names is not there."""
    if place is not None and is_local(place) and not place.exists():
        raise UserError(f"{option} {place}: nothing there")


def check_writable(folder: Path, key: str) -> None:
    """Raises UserError if `folder` cannot be written in, or if it is not there and cannot be made. Makes nothing."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{key}: {folder} cannot be a folder, because {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {folder} cannot be written: no permission in {there}, or it is read-only")


def is_local(place: str | Path) -> bool:
    """Whether `place` is a path and not a URL."""
    return "://" not in str(place)


def attempt(problems: list[str], check: Callable[[], T]) -> T | None:
    """Returns what `check` returns. If it raises a UserError, adds the message to `problems` and returns None."""
    try:
        return check()
    except UserError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return None


def say(problems: list[str]) -> None:
    """Raises one UserError that lists all `problems`, if there are any."""
    if problems:
        raise UserError("\n  ".join([problems[0], *problems[1:]]))
