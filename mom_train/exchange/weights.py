"""Weights of other runs and programs: our checkpoints, safetensors in our names, published Mamba-1 models (mamba_ssm,
Transformers).

A source is accounted for in full before anything is filled: each of its tensors goes into a parameter, each parameter
has a tensor, and what the source says of itself (its config) is what this model is. All that does not fit is one error,
a line for each fault. A dense model's weights fill every modality of a mixture, so that the mixture starts with exactly
the dense model's loss (upcycling).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mom_tokenizers.errors import UserError, read_json
from mom_tokenizers.media.shapes import Shapes
from mom_tokenizers.vocab import VocabLayout
from mom_train.checkpoint.files import Files
from mom_train.checkpoint.store import Checkpoint, Checkpoints
from mom_train.config.files import read_saved
from mom_train.config.migrations import migrated_config
from mom_train.config.model import DiffusionConfig, ModelConfig
from mom_train.exchange import published_mamba
from mom_train.model.language_model import LanguageModel

log = logging.getLogger(__name__)
_EXPORTED = "mixture_of_mamba"
"""model_type of a mixture that tools/export_model.py wrote for Transformers."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. It is not in memory until it is read."""

    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    """Its shape in our parameter."""
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Weights:
    """The tensors of a source, and what the source says about its model."""

    tensors: Mapping[str, Stored]
    """Name of our parameter -> the stored tensor."""
    model: ModelConfig | None = None
    """The config of the model, where the source states one in our form."""
    vocabulary: VocabLayout | None = None
    """Which rows of the embedding belong to which ids, where the source states it."""
    diffusion: DiffusionConfig | None = None
    published: Mapping[str, Any] | None = None
    """The config.json of a published Mamba-1."""
    foreign: bool = False
    """Whether its tensors have the names of a published Mamba-1."""
    problems: tuple[str, ...] = ()
    """Tensors that have no place in any model of ours."""
    assumed: tuple[str, ...] = ()
    """What the source does not state, and what is therefore assumed to be as the config of this run says."""


@dataclass(frozen=True)
class Move:
    """How a stored tensor becomes a parameter."""

    stored: Stored
    copies: int = 1
    """The parameter consists of this many copies of it, one after the other."""
    modalities: tuple[int, ...] = ()
    """For each modality of the parameter, the number of the stored block that it takes; (): the blocks stay as they
    are."""
    rows: tuple[Tensor, Tensor] | None = None
    """Rows of the parameter, and the stored rows that they take. Other rows keep their values. None: all rows are
    taken."""


# ---- opening ----------------------------------------------------------------------------------------------


def open_weights(path: Path) -> Weights:
    """Weights of a run (its newest checkpoint), of a checkpoint folder, of a .safetensors file, or of a folder of them,
    with what config.yaml, vocab.json and config.json beside them say.

    Raises UserError where there is nothing to read. What is there and cannot be used is reported by `match`.
    """
    if (path / ".metadata").is_file():
        return _open_checkpoint(Checkpoint(Files(str(path)), str(path)))
    if path.is_dir() and not any(path.glob("*.safetensors")) and (latest := Checkpoints.of(path).latest()):
        return _open_checkpoint(latest)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(f.is_file() and f.suffix == ".safetensors" for f in files):
        raise UserError(f"{path}: no checkpoint and no .safetensors weights there (pickled weights are not loaded)")
    tensors, problems = _read_headers(files)
    folder = files[0].parent
    file = folder / "config.json"
    config: Any = read_json(file) if file.is_file() else None
    if not isinstance(config, dict | None):
        raise UserError(f"{file}: expected a mapping")
    ours = read_saved(folder)
    vocabulary = VocabLayout.load(folder / "vocab.json") if (folder / "vocab.json").is_file() and ours else None
    if config is not None and config.get("model_type") == _EXPORTED:
        tensors = {name.removeprefix("model."): stored for name, stored in tensors.items()}
        values = migrated_config({key: config[key] for key in ("schema", "model") if key in config}, file)
        values["vocabulary"] = {str(name): size for name, size in config.get("vocabulary", [])}
        values["picture_shapes"] = config.get("picture_shapes")
        return replace(_of_run(values, file, None), tensors=tensors, problems=problems)
    if config is not None and (kind := published_mamba.other_kind(config)) is not None:
        raise UserError(f"{file} has {kind}")
    if config is not None or any(name.startswith("backbone.") for name in tensors):
        return _published(tensors, config, vocabulary, problems)
    if ours:
        return replace(_of_run(ours, folder / "config.yaml", vocabulary), tensors=tensors, problems=problems)
    hidden = (
        "which ids and which modalities it was trained on",
        "its norms' epsilon, nor what else shapes do not show",
    )
    return Weights(tensors, problems=problems, assumed=hidden)


def _read_headers(files: list[Path]) -> tuple[dict[str, Stored], tuple[str, ...]]:
    tensors: dict[str, Stored] = {}
    home: dict[str, Path] = {}
    twice = []
    for file in files:
        try:
            with safe_open(str(file), "pt") as stored:
                for name in stored.keys():  # noqa: SIM118  # not a mapping
                    if name in tensors:
                        twice.append(f"{name} is both in {home[name].name} and in {file.name}: name one of the files")
                    part = stored.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype(), torch.uint8)
                    tensors[name] = Stored(name, tuple(part.get_shape()), dtype, _safetensors_reader(file, name))
                    home[name] = file
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a safetensors file that can be read: {error}") from None
    return tensors, tuple(twice)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the types that weights come in; any other is a quantized model's."""


def _safetensors_reader(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(str(file), "pt") as stored:
            return stored.get_tensor(name)

    return read


def _published(
    tensors: Mapping[str, Stored],
    config: Mapping[str, Any] | None,
    vocabulary: VocabLayout | None,
    problems: tuple[str, ...],
) -> Weights:
    found: dict[str, Stored] = {}
    homeless, more = [], list(problems)
    for name, stored in tensors.items():
        ours = published_mamba.our_name(name)
        if ours is None:
            homeless.append(name)
        elif ours in found:
            more.append(f"{name} and {found[ours].name} are the same parameter")
        else:
            found[ours] = replace(stored, shape=published_mamba.our_shape(ours, stored.shape))
    if homeless:
        more.append(f"no Mamba-1 here has {_listed(homeless)}")
    embedding, head = found.get("embedding.weight"), found.get("head.weight")
    assumed = []
    if config is None:
        assumed = ["its norms' epsilon", "whether it has parts without weights, such as FalconMamba's norms"]
    if embedding is not None and (config is None or published_mamba.says_tied(config)):
        if head is None:
            found["head.weight"] = embedding
        elif config is not None and not torch.equal(embedding.read(), head.read()):
            more.append(f"{head.name} differs from {embedding.name}, and config.json says that the two are one (tied)")
    return Weights(found, None, vocabulary, None, config, True, tuple(more), tuple(assumed))


def _open_checkpoint(checkpoint: Checkpoint) -> Weights:
    checkpoint.check()
    entries = checkpoint.metadata().state_dict_metadata

    def stored(key: str) -> Stored:
        entry: Any = entries[key]

        def read() -> Tensor:
            value = torch.empty(entry.size, dtype=entry.properties.dtype)
            checkpoint.load({key: value}, no_dist=True)
            return value

        return Stored(key, tuple(entry.size), entry.properties.dtype, read)

    tensors = {key.removeprefix("model."): stored(key) for key in entries if key.startswith("model.")}
    config = checkpoint.train_state().get("config")
    if config is None:
        return Weights(tensors, assumed=("what its model's config was",))
    return replace(_of_run(config, checkpoint, None), tensors=tensors)


def _of_run(config: Mapping[str, Any], source: object, vocabulary: VocabLayout | None) -> Weights:
    """What a run's config, in today's form, says about its model. The tensors are added afterwards."""
    diffusion = (config.get("objective") or {}).get("diffusion")
    shapes = config.get("picture_shapes")
    try:
        return Weights(
            {},
            ModelConfig.model_validate(config.get("model")),
            vocabulary or VocabLayout.of(config.get("vocabulary") or {}, None if shapes is None else Shapes.of(shapes)),
            None if diffusion is None else DiffusionConfig.model_validate(diffusion),
        )
    except ValidationError as error:
        raise UserError(f"{source}: it does not describe a model of this version: {error}") from None


# ---- matching ---------------------------------------------------------------------------------------------


def match(
    model: LanguageModel, weights: Weights, source: Path, vocabulary: VocabLayout | None = None
) -> dict[str, Move]:
    """Which stored tensor each parameter of `model` takes. Reads nothing but what `weights` knows already.

    `vocabulary` is this model's; without it, ids are matched by their number. A vocabulary that has grown keeps its own
    initial rows. Raises one UserError that lists everything of the source that has no place in this model, everything
    of this model that has no source, and every setting in which they differ.
    """
    problems = [*weights.problems, *_differences(model, weights, vocabulary)]
    with torch.device("meta"):
        rows = model.embedding.weight.shape[0]
        shared = model.config.model_copy(update={"decoupled": ()})
        dense = dict(LanguageModel(shared, rows, 1, diffusion=model.diffusion).named_parameters())
    moves: dict[str, Move] = {}
    missing: list[str] = []
    unlike: list[str] = []
    for name, parameter in model.named_parameters():
        stored = weights.tensors.get(name)
        if stored is None:
            missing.append(name)
            continue
        if not stored.dtype.is_floating_point:
            unlike.append(f"'{stored.name}' is not in floating point: quantized weights are not read")
        shape = tuple(parameter.shape)
        move: Move | str
        if name in ("embedding.weight", "head.weight"):
            move = _move_of_rows(stored, shape, weights, vocabulary)
        else:  # a router has no counterpart in a dense model
            one = tuple(dense[name].shape) if name in dense else shape
            move = _move_of_copies(stored, shape, one, weights, vocabulary)
        if isinstance(move, str):
            unlike.append(move)
        else:
            moves[name] = move
    problems += dict.fromkeys(re.sub(r"\.\d+\.", ".*.", fault) for fault in unlike)
    # a dense model has no routers: a mixture that is filled with its copies keeps its own initial ones
    upcycled = {name.removesuffix(".weight") for name, move in moves.items() if move.copies > 1}
    missing = [name for name in missing if not (name.endswith(".router") and name[: -len(".router")] in upcycled)]
    if missing:
        problems.append(f"it has no {_listed(missing)}")
    known = dict(model.named_parameters())
    if unknown := [stored.name for name, stored in weights.tensors.items() if name not in known]:
        problems.append(f"this model has no place for {_listed(unknown)}")
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise UserError(f"init_from: {source} is not a source of this model's weights:{lines}")
    if weights.assumed:
        log.warning("init_from: %s does not say %s: taken to be as here", source, "; nor ".join(weights.assumed))
    notes = []
    if (partly := moves["embedding.weight"].rows) is not None:
        notes.append(f"; {rows - len(partly[0])} rows of the embedding keep initial values")
        notes.append(
            f"; {moves['embedding.weight'].stored.shape[0] - len(partly[1])} rows of the source's are left out"
        )
    if upcycled:
        notes.append("; every modality starts from the same copy")
    log.info("init_from: %d tensors of %s fill this model%s", len(weights.tensors), source, "".join(notes))
    return moves


def _differences(model: LanguageModel, weights: Weights, vocabulary: VocabLayout | None) -> list[str]:
    """One line for each setting that the source states and in which this model differs."""
    problems = []
    if weights.published is not None:
        problems += published_mamba.differences(weights.published, model.config)
    theirs, ours = weights.model, model.config
    if theirs is None and ours.base_dim is not None:
        problems.append(
            f"model.base_dim={ours.base_dim} scales initial values and learning rates together, and nothing says that "
            "these weights were trained so: leave model.base_dim out"
        )
    if theirs is not None:
        passed_over = {"decoupled", "identical_modalities"}
        if not theirs.decoupled:
            passed_over |= {"router", "experts"}  # a dense source fills them all
        old, new = theirs.model_dump() | {"dt_rank": theirs.rank}, ours.model_dump() | {"dt_rank": ours.rank}
        for name in sorted(set(old) - passed_over):
            if old[name] != new[name]:
                problems.append(f"model.{name} is {old[name]} there, here {new[name]}")
        if apart := [part for part in theirs.decoupled if part not in ours.decoupled]:
            problems.append(f"it has weights for each modality of {', '.join(apart)}, which this model shares")
    if weights.diffusion is not None and model.diffusion is not None:
        for key in ("steps", "prediction"):
            there, here = getattr(weights.diffusion, key), getattr(model.diffusion, key)
            if there != here:
                problems.append(f"objective.diffusion.{key} is {there} there, here {here}")
    if weights.vocabulary is not None and vocabulary is not None:
        there_M, here_M = weights.vocabulary.modalities, vocabulary.modalities
        if gone := [name for name in there_M if name not in here_M]:
            problems.append(f"it was trained on {', '.join(gone)} too, which this vocabulary lacks")
        if theirs is not None and theirs.decoupled and (more := [name for name in here_M if name not in there_M]):
            problems.append(
                f"its weights are those of {', '.join(there_M)}: there are none for {', '.join(more)} "
                "(only a dense source fills every modality)"
            )
        sizes = dict(vocabulary.sizes)
        for name, size in weights.vocabulary.sizes:
            if size > sizes.get(name, size):
                problems.append(f"it has {size} ids of {name}, this vocabulary {sizes[name]}: set vocabulary.{name}")
    return problems


def _move_of_rows(
    stored: Stored, shape: tuple[int, ...], weights: Weights, vocabulary: VocabLayout | None
) -> Move | str:
    """For an embedding or a head: each id's row goes to the row of the same id in this vocabulary. Returns a text where
    something prevents that."""
    rows, config = stored.shape[0], weights.published or {}
    ids, multiple = config.get("vocab_size") or rows, config.get("pad_vocab_size_multiple") or 1
    if rows not in (ids, -(-ids // multiple) * multiple):
        return f"'{stored.name}' has {rows} rows, but config.json says vocab_size {ids}"
    if stored.shape[1:] != shape[1:] or (vocabulary is None and rows > shape[0]):
        return _apart(stored, shape)
    if weights.vocabulary is not None and rows != weights.vocabulary.size:
        return f"'{stored.name}' has {rows} rows, but the vocabulary beside it says {weights.vocabulary.size}"
    if vocabulary is None or weights.vocabulary == vocabulary:
        return Move(stored, rows=None if rows == shape[0] else (torch.arange(rows), torch.arange(rows)))
    if weights.vocabulary is not None:
        return Move(stored, rows=_same_ids(weights.vocabulary, vocabulary))
    # It does not say which ids are what. Ours, in our names or with our special ids, has as many rows as this model;
    # anyone else's rows are all text, and the ids behind the last of them are padding.
    specials = {f"{name}_token_id": vocabulary.specials[name] for name in ("bos", "eos", "pad")}
    if rows == shape[0] and (not weights.foreign or specials.items() <= config.items()):
        return Move(stored)
    text = vocabulary.sizes[0][1]
    if ids > text:
        return f"'{stored.name}' has {ids} ids of text, this vocabulary {text}: set vocabulary.text={ids}"
    kept = torch.arange(min(rows, text))
    return Move(stored, rows=(kept, kept))


def _apart(stored: Stored, shape: tuple[int, ...]) -> str:
    return f"'{stored.name}' has shape {stored.shape} there, this model's is {shape}"


def _same_ids(old: VocabLayout, new: VocabLayout) -> tuple[Tensor, Tensor]:
    """Pairs (ids of `new`, ids of `old`) with the same meaning: the common ids of each modality, and special tokens by
    name."""
    here: list[int] = []
    there: list[int] = []
    sizes = dict(new.sizes)
    for name, size in old.sizes:
        if name in sizes:
            codes = torch.arange(min(size, sizes[name])).numpy()
            here += new.ids(name, codes).tolist()
            there += old.ids(name, codes).tolist()
    for name, id_ in old.specials.items():
        if name in new.specials and new.specials[name] not in here:
            here.append(new.specials[name])
            there.append(id_)
    return torch.tensor(here), torch.tensor(there)


def _move_of_copies(
    stored: Stored, shape: tuple[int, ...], dense: tuple[int, ...], weights: Weights, vocabulary: VocabLayout | None
) -> Move | str:
    """For a parameter that may have a copy for each modality, where `dense` is the shape of one copy. Returns a text
    where the stored tensor does not fit."""
    if stored.shape == shape:
        old, new = weights.vocabulary, vocabulary
        if shape == dense or old is None or new is None or old.modalities == new.modalities:
            return Move(stored)
        if set(old.modalities) != set(new.modalities):
            return _apart(stored, shape)
        return Move(stored, modalities=tuple(old.modalities.index(name) for name in new.modalities))
    return Move(stored, copies=shape[0] // dense[0]) if stored.shape == dense else _apart(stored, shape)


def _listed(names: Iterable[str]) -> str:
    """Lists names in one line. Names that differ only in the number of their block appear once, with how many there
    are."""
    count = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return ", ".join(f"{name} ({n} of them)" if "*" in name else name for name, n in count.items())


# ---- filling ----------------------------------------------------------------------------------------------


def load_weights(model: LanguageModel, weights: Weights, source: Path, vocabulary: VocabLayout | None = None) -> None:
    """Fills every parameter of `model` from `weights`, by `match` and `fill`; or raises one UserError and fills
    nothing."""
    fill(model, match(model, weights, source, vocabulary))


@torch.no_grad()
def fill(model: LanguageModel, moves: Mapping[str, Move]) -> None:
    """Fills `model`, sharded or not, one parameter at a time. It is collective where a vocabulary has grown."""
    for name, parameter in model.named_parameters():
        if name not in moves:
            continue
        move = moves[name]
        value = move.stored.read().float().reshape(move.stored.shape)
        if move.copies > 1:
            value = value.repeat(move.copies, *[1] * (value.dim() - 1))
        if move.modalities:
            value = torch.cat([value.chunk(len(move.modalities))[number] for number in move.modalities])
        if move.rows is not None:
            here, there = move.rows
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            grown = whole.detach().cpu().float().clone()
            grown[here] = value[there]
            value = grown
        assert value.shape == parameter.shape, name
        if isinstance(parameter, DTensor):
            shard = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(shard.to_local())
        else:
            parameter.copy_(value)
