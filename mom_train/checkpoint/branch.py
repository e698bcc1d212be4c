"""Takes the checkpoint of another run as the first one of a branch, and leaves that run as it is."""

from __future__ import annotations

import os

from mom_tokenizers.errors import UserError, user_path
from mom_train.checkpoint.files import METADATA
from mom_train.checkpoint.store import SUMS, Checkpoint, Checkpoints
from mom_train.config.branch import BranchConfig


def trunk_checkpoint(branch: BranchConfig) -> Checkpoint:
    """The checkpoint that a branch begins from. Raises UserError, which lists the others, if it is not there."""
    trunk = Checkpoints.of(branch.run)
    found = trunk[branch.step]
    if not found.committed:
        others = ", ".join(str(c.step) for c in trunk.committed()) or "none"
        raise UserError(f"{trunk.root} has no checkpoint of step {branch.step}; there are: {others}")
    return found


def adopt(branch: BranchConfig, checkpoints: Checkpoints) -> Checkpoint:
    """Makes the trunk's checkpoint the newest of `checkpoints`, which are those of the branch.

    Files on the same disk become hard links, which is safe because no file of a checkpoint is ever changed in place;
    others are copied. From then on the branch does not need the trunk, which may remove its checkpoint at any time.
    Every file's checksum is verified. Raises UserError if that fails or if the two runs share their place.
    """
    source = trunk_checkpoint(branch)
    target = checkpoints[branch.step]
    if source.path == target.path:
        raise UserError(f"the branch and its trunk would both write to {checkpoints.root}; use another run_dir")
    checkpoints.files.remove(target.path)
    checkpoints.files.mkdir(target.path)
    try:
        for name in [*(n for n in source.sums() if n != METADATA), SUMS, METADATA]:  # the last one commits it
            _take(source, target, name)
    except FileNotFoundError as error:
        checkpoints.files.remove(target.path)
        raise UserError(f"{source} was removed while it was read: {error.filename or error}") from None
    if damage := target.damage():
        target.mark_damaged()
        raise UserError(f"{source} is damaged: {'; '.join(damage)}")
    checkpoints.point(target)
    return target


def _take(source: Checkpoint, target: Checkpoint, name: str) -> None:
    there, here = f"{source.path}/{name}", f"{target.path}/{name}"
    with user_path(here):
        if source.files.local and target.files.local:
            try:
                os.link(there, here)
                return
            except FileNotFoundError:
                raise
            except OSError:  # another disk, or one without hard links
                pass
        with source.files.fs.open(there, "rb") as stream, target.files.fs.open(here, "wb") as copy:
            while chunk := stream.read(1 << 22):
                copy.write(chunk)
