"""The section of a config that says which checkpoint of which other run a run begins from."""

from __future__ import annotations

from pydantic import PositiveInt

from mom_train.config.section import Name, Section


class BranchConfig(Section):
    """The checkpoint of another run, the trunk, that this run begins from with everything: weights, moments, averages,
    position in the data, tokens and FLOPs. `mom branch` writes this section. The trunk itself is not changed."""

    run: Name
    """Folder of the trunk, or the URL that its checkpoints are under."""
    step: PositiveInt
    """Step of the trunk's checkpoint."""
