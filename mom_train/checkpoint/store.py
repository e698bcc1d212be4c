"""The place where checkpoints are stored: a folder, or any URL that fsspec can open (s3://bucket/run).

    ROOT/checkpoints/step-N/     __R_0.distcp (rank R's tensors), train_state.json, checksums.json, .metadata
    ROOT/LATEST                  the name of the newest checkpoint
    ROOT/BEST                    the name of the best checkpoint, if the config has checkpoint.best

DCP stands for torch.distributed.checkpoint. A save writes the tensors, then checksums.json (size and crc32 of every
file), then `.metadata`, which is DCP's index of the tensors and commits the checkpoint, then LATEST. A folder without
`.metadata` is a save that did not finish.

Loading a checkpoint cannot run code that is in it. DCP pickles `.metadata`, and DCP itself unpickles it without any
limit; this module lets through only the few classes that such an index consists of. DCP also stores every value that is
not a tensor as a pickle, which its load planner opens with `weights_only=False`. Our checkpoints hold no such values,
and one that does is refused. DCP reads the tensors themselves with `weights_only=True`.
"""

from __future__ import annotations

import copy
import errno
import io
import json
import pickle
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mom_tokenizers.errors import AgreedError, UserError, mendable
from mom_train.checkpoint.files import METADATA, Files, Sum, file_name
from mom_train.config.files import read_saved, validated
from mom_train.config.migrations import migrated_state
from mom_train.config.run import RunConfig

_CHUNK = 1 << 22  # number of bytes read at a time
SUMS, _STATE = "checksums.json", "train_state.json"
_DAMAGED = ".metadata.damaged"  # new name of `.metadata` once the checkpoint is known to be damaged


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint of one step: a folder."""

    files: Files
    path: str

    def __str__(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        return file_name(self.path)

    @property
    def step(self) -> int:
        """The step that the checkpoint was made after."""
        return int(self.name.removeprefix("step-"))

    @property
    def committed(self) -> bool:
        """Whether the save was finished, and no damage has been found since."""
        return self.files.exists(f"{self.path}/{METADATA}")

    @property
    def damaged(self) -> bool:
        """Whether the checkpoint was marked as damaged, or as one that a run went back from."""
        return self.files.exists(f"{self.path}/{_DAMAGED}")

    def mark_damaged(self) -> None:
        """Marks the checkpoint so that it no longer counts as committed."""
        self.files.rename(f"{self.path}/{METADATA}", f"{self.path}/{_DAMAGED}")

    def train_state(self) -> dict[str, Any]:
        """The state of the run that is not a tensor, in the current schema. Raises UserError if it cannot be read."""
        try:
            values = json.loads(self.files.read(f"{self.path}/{_STATE}"))
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{self.path}/{_STATE}: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"{self.path}/{_STATE}: expected a JSON object")
        return migrated_state(values, self)

    def config(self) -> RunConfig:
        """The complete config of the run that saved the checkpoint. Raises UserError if it cannot be read."""
        return validated(self.train_state().get("config") or {}, self)

    def keep_every(self) -> int | None:
        """The value of `checkpoint.keep_every` in the config of the run that saved the checkpoint."""
        config = self.train_state().get("config") or {}
        return config.get("checkpoint", {}).get("keep_every")

    def permanent(self, keep_every: int | None) -> bool:
        """Whether `keep_every` divides the step, so that the checkpoint is never deleted."""
        return keep_every is not None and self.step % keep_every == 0

    def sums(self) -> dict[str, Sum]:
        """Size and checksum that each file of the checkpoint should have. Raises UserError if they cannot be read."""
        path = f"{self.path}/{SUMS}"
        try:
            return {str(name): Sum(**values) for name, values in json.loads(self.files.read(path)).items()}
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None

    def damage(self, part: int = 0, parts: int = 1, progress: Callable[[int], object] = bool) -> list[str]:
        """Reads every `parts`-th file from number `part` on, and says in one line per damaged file what is wrong with
        it.

        `progress` is called with the length of each piece that was read.
        """
        try:
            sums = self.sums()
        except UserError as error:
            return [str(error)]
        missing = [n for n in (METADATA, _STATE) if n not in sums]
        found = [f"{self.path}/{name} is not in {SUMS}" for name in missing]
        for name in sorted(sums)[part::parts]:
            path, want = f"{self.path}/{name}", sums[name]
            try:
                size, crc32 = 0, 0
                with self.files.fs.open(path, "rb") as stream:
                    while chunk := stream.read(_CHUNK):
                        size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
                        progress(len(chunk))
            except FileNotFoundError:
                found.append(f"{path} is missing")
                continue
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                found.append(f"{path} cannot be read: {error.strerror}")  # a bad block of the disk counts as damage
                continue
            if size != want.size:
                found.append(f"{path} has {size:,} bytes instead of {want.size:,}")
            elif crc32 != want.crc32:
                found.append(f"{path} has crc32 {crc32:08x} instead of {want.crc32:08x}")
        return found

    def check(self) -> None:
        """Raises UserError if the checkpoint is damaged."""
        if damage := self.damage():
            raise UserError(f"{self} is damaged: {'; '.join(damage)}")

    def metadata(self) -> index.Metadata:
        """DCP's index: shapes, types and places of the tensors by name. Raises UserError if it cannot be read or holds
        anything else."""
        path = f"{self.path}/{METADATA}"
        try:
            content = self.files.read(path)
        except FileNotFoundError:
            raise UserError(f"{self.path} is not a committed checkpoint: it has no {METADATA}") from None
        try:
            metadata = _IndexUnpickler(io.BytesIO(content), path).load()
        except UserError:
            raise
        except Exception as error:  # a damaged pickle can fail in any way
            raise UserError(f"{path} cannot be read: {error}") from None
        if not isinstance(metadata, index.Metadata):
            raise UserError(f"{path} is not the index of a checkpoint")
        sums = self.sums()
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, index.TensorStorageMetadata):
                raise UserError(f"{path}: '{key}' is not a tensor but a pickle, which could run code; not loaded")
        for place in metadata.storage_data.values():
            if place.relative_path not in sums:
                raise UserError(f"{path}: it has tensors in '{place.relative_path}', which {SUMS} does not list")
        return metadata

    def load(self, values: dict[str, Any], no_dist: bool = False) -> None:
        """Fills the tensors of the nested dict `values` in place, resharding as needed. Collective unless `no_dist`.

        Raises UserError on all ranks if a tensor is missing or has another shape, and RuntimeError if the machine or
        the network failed.
        """
        if no_dist:
            self.metadata()  # says in one line what is wrong; DCP would log tracebacks first
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # DCP warns that only one process takes part, which is intended
                dcp.load(values, storage_reader=_Reader(self), no_dist=no_dist)
        except CheckpointException as error:  # not an Exception, but a BaseException
            _, (reason, _) = min(error.failures.items())
            said = f"{self.path}: {first_failure(error)}"
            if isinstance(reason, (OSError, MemoryError, torch.OutOfMemoryError)) and not isinstance(
                reason, FileNotFoundError
            ):
                raise RuntimeError(said) from error
            raise (UserError if no_dist else AgreedError)(said) from None


def with_absolute_place(config: RunConfig) -> RunConfig:
    """The config with an absolute checkpoint.path, so that the checkpoints are found from any working directory."""
    path = config.checkpoint.path
    if path is None or "://" in path:
        return config
    absolute = config.checkpoint.model_copy(update={"path": str(Path(path).absolute())})
    return config.model_copy(update={"checkpoint": absolute})


class Checkpoints:
    """All checkpoints of a run."""

    def __init__(self, root: str | Path):
        self.files = Files(str(root))
        self.root = self.files.root

    @classmethod
    def of(cls, run: str | Path) -> Checkpoints:
        """The checkpoints of a run. `run` is its folder, whose config.yaml says where they are, or the URL that holds
        them."""
        elsewhere = read_saved(run).get("checkpoint", {}).get("path")
        return cls(elsewhere or run)

    def __getitem__(self, step: int) -> Checkpoint:
        return Checkpoint(self.files, f"{self.root}/checkpoints/step-{step}")

    def all(self) -> list[Checkpoint]:
        """All checkpoints in the order of their steps, committed or not."""
        names = (
            name.removeprefix("step-") for name in self.files.folders(f"{self.root}/checkpoints") if "step-" in name
        )
        return [self[step] for step in sorted(int(n) for n in names if n.isdigit())]

    def committed(self) -> list[Checkpoint]:
        """The committed checkpoints in the order of their steps."""
        return [c for c in self.all() if c.committed]

    def latest(self) -> Checkpoint | None:
        """The checkpoint that LATEST names.

        Without LATEST, which is missing if the run was killed right after its first commit, it is the newest committed
        checkpoint, or None. Raises UserError if LATEST names a checkpoint that is not there.
        """
        pointer = f"{self.root}/LATEST"
        try:
            name = self.files.read(pointer).decode(errors="replace").strip()
        except FileNotFoundError:
            committed = self.committed()
            return committed[-1] if committed else None
        found = Checkpoint(self.files, f"{self.root}/checkpoints/{name}")
        if not found.committed:
            others = [c.name for c in self.committed()]
            raise UserError(
                f"{pointer} names {name!r}, which is not a committed checkpoint. "
                + (f"Committed: {', '.join(others)}; write one of these names into it." if others else "None is.")
            )
        return found

    def best(self) -> Checkpoint | None:
        """The checkpoint that BEST names, or None if there is none."""
        try:
            name = self.files.read(f"{self.root}/BEST").decode(errors="replace").strip()
        except FileNotFoundError:
            return None
        found = Checkpoint(self.files, f"{self.root}/checkpoints/{name}")
        return found if name and found.committed else None

    def find(self, step: int | Literal["best"] | None = None) -> Checkpoint:
        """The newest checkpoint (None), the best, or that of one step. Raises UserError if there is none."""
        found = self.latest() if step is None else self.best() if step == "best" else self[step]
        if found is None or not found.committed:
            what = "best checkpoint (checkpoint.best)" if step == "best" else "committed checkpoint"
            raise UserError(f"{found or self.root}: no {what} there")
        return found

    def check_begins_anew(self, config: RunConfig) -> None:
        """Raises UserError if the run has checkpoints in the place that its config named before.

        It is called when there are none here, so that the run would start from the beginning by mistake.
        """
        before = Checkpoints.of(config.run_dir)
        if before.root != self.root and (latest := before.latest()) is not None:
            raise UserError(
                f"the checkpoints of {config.run_dir} are in {before.root} (step {latest.step} is there), and "
                f"checkpoint.path now names {self.root}, which holds none: the run would start from the beginning. "
                "Name the old place, move what is there to the new one, or use another run_dir."
            )

    def point(self, to: Checkpoint) -> None:
        """Writes LATEST."""
        self.files.write(f"{self.root}/LATEST", f"{to.name}\n".encode())

    def point_at_best(self, to: Checkpoint | None) -> None:
        """Writes BEST, or removes it if `to` is None."""
        path = f"{self.root}/BEST"
        if to is not None:
            self.files.write(path, f"{to.name}\n".encode())
        elif self.files.exists(path):
            self.files.rm_file(path)

    def prune(self, newest: int, keep: int, keep_every: int | None) -> list[Checkpoint]:
        """Removes the checkpoints up to step `newest` except the last `keep`, the multiples of `keep_every` and the
        best.

        Later checkpoints stay: a run that was taken back to an older step has not reached them again yet. Returns the
        removed checkpoints.
        """
        older = [c for c in self.committed() if c.step <= newest]
        best = self.best()
        removed = [c for c in older[:-keep] if not c.permanent(keep_every) and (best is None or c.step != best.step)]
        for checkpoint in removed:
            self.files.remove(checkpoint.path)
        return removed

    def clean(self) -> list[Checkpoint]:
        """Removes and returns saves that did not finish."""
        removed = [c for c in self.all() if not c.committed and not c.damaged]
        for checkpoint in removed:
            self.files.remove(checkpoint.path)
        return removed

    def write(self, step: int, values: dict[str, Any], train_state: str, group: dist.ProcessGroup | None) -> None:
        """Saves and commits the nested dict of tensors `values`. Collective over `group`; None is this process alone.

        If any rank cannot write, all ranks raise UserError if the user can mend the cause, such as a full disk, or else
        RuntimeError. What was written is then removed.
        """
        checkpoint = self[step]
        writer = _Writer(self, checkpoint, train_state)
        try:
            dcp.save(values, storage_writer=writer, process_group=group, no_dist=group is None)
        except CheckpointException as error:
            if (group is None or dist.get_rank(group) == 0) and not checkpoint.committed:
                with suppress(OSError):  # a full disk needs the space; a read-only one has no files to remove
                    self.files.remove(checkpoint.path)
            _, (reason, _) = min(error.failures.items())
            raise (UserError if mendable(reason) else RuntimeError)(f"{checkpoint}: {first_failure(error)}") from None


def first_failure(error: CheckpointException) -> str:
    """Message of the failed rank with the lowest number."""
    rank, (reason, _) = min(error.failures.items())
    return f"[rank {rank}] {reason}"


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles the index that DCP writes, and refuses every other pickle."""

    _ALLOWED = {  # noqa: RUF012
        (c.__module__, c.__qualname__): c
        for c in (
            index.Metadata,
            index.MetadataIndex,
            index.TensorStorageMetadata,
            index.BytesStorageMetadata,
            index.ChunkStorageMetadata,
            index.TensorProperties,
            index._MEM_FORMAT_ENCODING,
            index.StorageMeta,
            filesystem._StorageInfo,
            torch.Size,
        )
    }

    def __init__(self, stream: io.BytesIO, path: str):
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return self._ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return lambda layout: torch.strided
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11 pickles a member of an Enum
            return lambda of, member: index._MEM_FORMAT_ENCODING[member]
        raise UserError(f"{self._path} asks for {module}.{name}, which no checkpoint needs; not loaded")


class _Reader(dcp.FileSystemReader):
    """Reads a checkpoint with the index from `Checkpoint.metadata`, which is safe to unpickle."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint.path)
        self.fs, self.path = checkpoint.files, checkpoint.path  # type: ignore[assignment]
        self._checkpoint = checkpoint

    def read_metadata(self, *args: Any, **kwargs: Any) -> index.Metadata:
        metadata = self._checkpoint.metadata()
        metadata.storage_meta = index.StorageMeta(load_id=self.load_id)
        return metadata


@dataclass(frozen=True)
class _Written(WriteResult):
    """DCP's record of a tensor that was written, with the size and checksum of its file."""

    file: Sum


class _Writer(dcp.FileSystemWriter):
    """Writes one checkpoint. DCP calls its methods on every rank, and all ranks fail if one fails."""

    def __init__(self, checkpoints: Checkpoints, checkpoint: Checkpoint, train_state: str):
        files = copy.copy(checkpoints.files)
        files.written = {}
        super().__init__(checkpoint.path, sync_files=files.local)
        self.fs, self.path = files, checkpoint.path  # type: ignore[assignment]
        self._files, self._checkpoints, self._checkpoint = files, checkpoints, checkpoint
        self._train_state = train_state

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Makes an empty folder. DCP calls this on rank 0 when all ranks have planned and none has begun to write."""
        folder = self._checkpoint.path
        self._files.remove(folder)
        self._files.mkdir(folder)
        self._files.write(f"{folder}/{_STATE}", self._train_state.encode())
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written: Future[list[WriteResult]] = Future()
        results = super().write_data(plan, planner).value()
        written.set_result(
            [
                _Written(r.index, r.size_in_bytes, r.storage_data, self._files.written[r.storage_data.relative_path])
                for r in results
            ]
        )
        return written

    def finish(self, metadata: index.Metadata, results: list[list[WriteResult]]) -> None:
        """Commits the checkpoint. DCP calls this on rank 0 when all ranks have written."""
        written = [result for of_rank in results for result in of_rank]
        metadata.storage_data = {r.index: r.storage_data for r in written}
        metadata.storage_meta = index.StorageMeta(save_id=self.save_id)
        metadata.version = filesystem.CURRENT_DCP_VERSION
        content = pickle.dumps(metadata)
        sums = {r.storage_data.relative_path: r.file for r in written if isinstance(r, _Written)}
        sums |= {_STATE: self._files.written[_STATE], METADATA: Sum(len(content), zlib.crc32(content))}
        text = json.dumps({name: asdict(value) for name, value in sorted(sums.items())}, indent=1) + "\n"
        self._files.write(f"{self.path}/{SUMS}", text.encode())
        self._files.write(f"{self.path}/{METADATA}", content)
        self._checkpoints.point(self._checkpoint)
