"""Turns the data sources of a config into plans, which fix the order of the data, and handles changes during a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mom_data.order.forecast import remarks
from mom_data.order.plan import PLAN_VERSION, Cursor, Plan, Source
from mom_data.shards.dataset import TokenDataset, check_agreement
from mom_data.shards.storage import default_cache
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import UserError
from mom_train.checkpoint.saver import TrainState
from mom_train.config.data import SourceConfig
from mom_train.config.files import differences, with_defaults
from mom_train.config.run import RunConfig
from mom_train.model.objective import with_latents_of
from mom_train.validation.losses import rows_of

log = logging.getLogger(__name__)

VALIDATION_WINDOW = 2048
"""Number of pieces of a validation set that are packed together. It is not the `data.pack_window` of the run, so that
figures of runs with different training orders can be compared."""
Phase = dict[str, Any]
"""What a checkpoint keeps about a phase, a part of the run with unchanged data settings: its first sequence (`since`),
the version of the order (`plan_version`), and the settings of the order that a new phase may change."""


class Datasets:
    """The token datasets of a run. Each is opened only once, even if several sources use it."""

    def __init__(self, config: RunConfig):
        self._config, self._tokenizers = config.data, config.tokenizers
        self._opened: dict[str, TokenDataset] = {}

    def sources(self, entries: Iterable[SourceConfig]) -> tuple[Source, ...]:
        """The datasets of these sources with their weights."""
        return tuple(Source(self._open(entry), entry.weight) for entry in entries)

    def _open(self, entry: SourceConfig) -> TokenDataset:
        key = entry.model_copy(update={"weight": 1.0}).model_dump_json()
        if key not in self._opened:
            cache = self._config.cache
            if entry.path is not None:
                dataset = TokenDataset(entry.path, entry.shards, cache, int(self._config.cache_gib * 2**30))
            else:
                from mom_data.shards.online import OnlineDataset  # here: it imports packages of tokenizers

                assert self._tokenizers is not None
                where = cache or default_cache()
                dataset = OnlineDataset(
                    entry.raw, self._tokenizers, where, entry.shards, split=entry.split, holdout=entry.holdout
                )
            self._opened[key] = dataset
        return self._opened[key]

    def __iter__(self) -> Any:
        return iter(self._opened.values())


_ORDER = {"train", "pack_window", "shuffle_units", "packing", "cut_spans"}
"""Keys of the section `data` that determine the order and that a new phase may change."""


def planned_as_now(phases: Sequence[Phase]) -> bool:
    """Whether this version plans the same order as the one that made these phases. If not, their cursors are
    invalid."""
    return all(phase.get("plan_version") == PLAN_VERSION for phase in phases)


def training_plan(
    config: RunConfig,
    datasets: Datasets,
    saved: Sequence[Phase] = (),
    fingerprint: str = "",
    sequence: int = 0,
    was: Mapping[str, Any] | None = None,
) -> tuple[Plan, list[Phase]]:
    """Makes the training plan of a run. Returns (the plan, its phases).

    If the run has a checkpoint, `saved` are its phases, `fingerprint` is that of its plan, `sequence` is the position
    in this plan at which it was made, and `was` is its saved config.

    Raises UserError if
    - the config asks for another order than that of the checkpoint without `new_phase`;
    - this version does not plan the order of the checkpoint any more and `new_phase` is not set. With `new_phase`, a
      new order begins at `sequence`, with every document once per epoch from there on;
    - the run begins, its objective is diffusion, and no source holds latents of pictures.
    """
    data = config.data

    def plan(phase: Phase, before: Plan | None) -> Plan:
        sources = datasets.sources(SourceConfig.model_validate(s) for s in phase["train"])
        return Plan(
            sources,
            data.sequence_length,
            data.lanes,
            phase["pack_window"],
            config.seed,
            phase["shuffle_units"],
            phase["packing"],
            phase["cut_spans"],
            before,
            phase["since"],
        )

    def chain(phases: Sequence[Phase]) -> Plan | None:
        before = None
        for phase in phases:
            before = plan(phase, before)
        return before

    now = data.model_dump(mode="json", include=_ORDER) | {"plan_version": PLAN_VERSION}
    if not planned_as_now(saved):
        if not data.new_phase:
            raise UserError(
                f"the order of the data has changed since the run's checkpoint was made (it is version {PLAN_VERSION} "
                "now), and the old order cannot be continued. To continue the run in a new order, add "
                f"data.new_phase=true: from sequence {sequence} on, every document then comes once per epoch, even "
                "if the last epoch before the checkpoint has had it already. Or finish the run with the version of "
                "this program that began it, or use another run_dir."
            )
        return plan({**now, "since": sequence}, None), [{**now, "since": sequence}]
    since = saved[-1]["since"] if saved else 0
    earlier = list(saved[:-1])
    same = plan({**now, "since": since}, chain(earlier))
    if config.objective.diffusion is not None and not saved:
        _check_latents(same.sources)
    if not saved or same.fingerprint == fingerprint:
        return same, [*earlier, {**now, "since": since}]
    if not data.new_phase:
        raise UserError(
            f"the order of the data in the config (plan {same.fingerprint}) is not that of the run's checkpoint (plan "
            f"{fingerprint}). What was -> what is:\n  {_what_changed(was, config)}\nRestore that; or, to continue with "
            "other sources, weights or packing from here on, add data.new_phase=true; or use another run_dir."
        )
    before = chain(saved)
    assert before is not None
    if before.fingerprint != fingerprint:
        raise UserError(
            "data.new_phase changes sources, weights and packing only: data.sequence_length, data.lanes and seed must "
            "be the checkpoint's, and the shards of its last phase must still be there as they were. Restore them, or "
            "use another run_dir."
        )
    return plan({**now, "since": sequence}, before), [*saved, {**now, "since": sequence}]


def _what_changed(was: Mapping[str, Any] | None, config: RunConfig) -> str:
    """The keys of the order whose values differ from those in the config of the checkpoint, one per line."""
    before, now = with_defaults(was or {}), config.model_dump(mode="json")
    order = ("seed", "data.sequence_length", "data.lanes", *(f"data.{key}" for key in sorted(_ORDER)))

    def pick(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: values.get("data", {}).get(k.removeprefix("data.")) if "." in k else values.get(k) for k in order}

    lines = differences(pick(before), pick(now)) if was else []
    return "\n  ".join(lines) or "no key of the config differs, so the shards have changed"


def _check_latents(sources: Iterable[Source]) -> None:
    """Raises UserError if none of the sources can hold latents of pictures."""
    if not any(source.dataset.manifest["latent_width"] for source in sources):
        raise UserError(
            "objective.diffusion denoises latents of pictures, and no source of data.train holds any: "
            f"{', '.join(source.dataset.location for source in sources)}. Tokenize them with a tokenizer of latents "
            "(kind: kl), or leave objective.diffusion out: pictures as codes do not need it."
        )


def validation_plans(config: RunConfig, datasets: Datasets) -> dict[str, Plan]:
    """Plans of one pass over each validation set, every document once. They do not depend on the training order."""
    return {
        name: Plan(
            datasets.sources(entries), config.data.sequence_length, lanes=1, window=VALIDATION_WINDOW, seed=0, once=True
        )
        for name, entries in config.data.validation.items()
    }


def log_forecast(config: RunConfig, plan: Plan, validation: Mapping[str, Plan]) -> None:
    """Logs how much of its data the run will see, and warns of settings that one would want to change beforehand."""
    sequences = config.training.sequences_before(config.training.steps)
    line, warnings = remarks(plan, sequences, validation, config.validation.sequences)
    if line:
        log.info(line)
    for warning in warnings:
        log.warning("data: %s", warning)
    trained_on = set(plan.identities)
    for name, of_set in validation.items():
        known = zip(of_set.sources, of_set.identities, strict=True)
        if shared := [source.dataset.location for source, identity in known if identity in trained_on]:
            log.warning(
                "data: validation set '%s' is trained on as well (%s), so its loss says nothing about new documents",
                name, ", ".join(shared),
            )  # fmt: skip


def log_validated_rows(config: RunConfig, plans: Mapping[str, Plan]) -> None:
    """Logs which validation sets are not evaluated whole."""
    for name, plan in plans.items():
        rows, more = rows_of(plan, config.validation.sequences)
        if more:
            log.info(
                "val/%s: the first %d rows of one pass over the set, which has more (validation.sequences)", name, rows
            )


def check(config: RunConfig, datasets: Datasets) -> RunConfig:
    """Checks the datasets, and returns the config with the scale and shift of their latents filled in. Raises UserError
    if they do not fit each other, the vocabulary or the tokenizers of the run."""
    made_by = None
    if config.tokenizers is not None:
        made_by = {m: {"fingerprint": f} for m, f in Tokenizers.load(config.tokenizers).fingerprints().items()}
    check_agreement(list(datasets), dict(config.layout.sizes), made_by, config.layout.shapes)
    diffusion = with_latents_of(config.objective.diffusion, list(datasets))
    return config.model_copy(update={"objective": config.objective.model_copy(update={"diffusion": diffusion})})


def text_bytes(config: RunConfig) -> np.ndarray | None:
    """Number of UTF-8 bytes of the text that each id of the vocabulary stands for, as (V,) int64; 0 for ids that stand
    for no text. None if the run names no tokenizers, or if they need a package that is not installed. Raises UserError
    if the tokenizers cannot be read."""
    if config.tokenizers is None:
        return None
    from mom_tokenizers.text import TextTokenizer

    [path] = [path for modality, _, path in Tokenizers.load(config.tokenizers).entries if modality == "text"]
    layout = config.layout
    try:
        by_code = TextTokenizer.stored_bytes_of_id(path)[: dict(layout.sizes)["text"]]
    except ImportError as error:
        log.warning(
            "bits per byte of text are not reported: they need a package that is not installed (%s). "
            "pip install 'mixture-of-mamba[tokenizers]'", error,
        )  # fmt: skip
        return None
    by_id = np.zeros(layout.size, np.int64)
    by_id[layout.ids("text", np.arange(len(by_code)))] = by_code
    by_id[layout.modality_of_id != 0] = 0  # codes of other modalities may lie among the ids of text
    by_id[list(layout.specials.values())] = 0
    return by_id


@dataclass(frozen=True)
class RunData:
    """The data of one run, after its order has been planned and everything has been checked."""

    config: RunConfig
    """The config of the run, with the scale and shift of latents from the datasets."""
    plan: Plan
    """The order of the training data."""
    phases: list[Phase]
    """The phases of that order."""
    validation_plans: dict[str, Plan]
    """The plan of each validation set."""
    text_bytes: np.ndarray | None
    """(V,) int64; see the function `text_bytes`."""
    minimal_pairs: dict[str, list[TokenDataset]]
    """The datasets of each set of evaluation.minimal_pairs."""


def open_data(config: RunConfig, saved: TrainState, *, say: bool) -> RunData:
    """Opens the datasets of a run whose state is `saved`, plans their order, and checks that everything fits together.

    With `say`, logs how much of its data the run will see, and warns of settings that one would want to change.
    Contains no collective operation. Raises UserError if something does not fit.
    """
    datasets = Datasets(config)
    validation = validation_plans(config, datasets)
    bytes_of_id = text_bytes(config)
    plan, phases = training_plan(config, datasets, saved.phases, saved.data_fingerprint, saved.sequence, saved.config)
    if say:
        log_forecast(config, plan, validation)
        log_validated_rows(config, validation)
    minimal_pairs = {
        name: [source.dataset for source in datasets.sources(entries)]
        for name, entries in config.evaluation.minimal_pairs.items()
    }
    return RunData(check(config, datasets), plan, phases, validation, bytes_of_id, minimal_pairs)


def build_plans(config: RunConfig) -> tuple[Plan, dict[str, Plan]]:
    """The training plan and the validation plans of a run that begins, whose datasets have been checked."""
    datasets = Datasets(config)
    plans = training_plan(config, datasets)[0], validation_plans(config, datasets)
    check(config, datasets)
    return plans


def newest(*known: Mapping[str, Cursor]) -> dict[str, Cursor]:
    """For each lane, the cursor among `known` that has advanced furthest."""
    merged: dict[str, Cursor] = {}
    for cursors in known:
        for lane, cursor in cursors.items():
            if lane not in merged or cursor.rows > merged[lane].rows:
                merged[lane] = cursor
    return merged
