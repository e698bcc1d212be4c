"""The instruments that the section `observe` of the config chooses, as the trainer uses them."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

from mom_train.config.run import RunConfig
from mom_train.distributed.ranks import Ranks
from mom_train.model.language_model import LanguageModel
from mom_train.observe.block_statistics import BlockStatistics
from mom_train.observe.garbage import Collections
from mom_train.observe.profiles import Profiles, Requests
from mom_train.observe.snapshots import MemorySnapshots
from mom_train.observe.speed import Speed


class Instruments:
    """Looks at the steps of a run without changing what they compute. A context manager around the whole training, so
    that it also sees how training fails. All ranks must call every method alike."""

    def __init__(self, config: RunConfig, ranks: Ranks, model: LanguageModel):
        last = min(config.training.stop_at or config.training.steps, config.training.steps)
        self._config, self._ranks = config, ranks
        self._requests = Requests(config.run_dir, ranks)
        self._profiles = Profiles(config.observe, config.run_dir, ranks, last)
        self._collections = Collections(config.observe.gc_every)
        self._snapshots = MemorySnapshots(config.run_dir, ranks, config.observe.memory_history)
        self._statistics = BlockStatistics(model, list(model.blocks), config.layout.modalities)
        self._stack = ExitStack()

    def __enter__(self) -> Instruments:
        self._stack.enter_context(self._snapshots)
        self._stack.enter_context(self._collections)
        self._stack.callback(self._profiles.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def measure(self) -> None:
        """Measures what the machine can do. Call it before the first step."""
        self.speed = Speed(self._config, self._ranks)

    def requests(self) -> dict[str, bool]:
        """What this rank was asked for: "profile" and "memory". The ranks must agree on it."""
        return self._requests.look("profile", "memory")

    def begin(self, step: int, profile: bool, memory: bool) -> None:
        """The step with this number begins. The ranks have agreed on whether a `profile` of the steps from this one on
        and a snapshot of the `memory` were asked for."""
        if memory:
            self._snapshots.write(f"step-{step}")
        self._profiles.begin(step, profile)
        every = self._config.observe.statistics_every
        if every is not None and step % every == 0:
            self._statistics.begin()

    def update(self) -> AbstractContextManager[None]:
        """A context for the update of the weights."""
        return self._statistics.update()

    def figures(self, flops: int, seconds: float) -> dict[str, float]:
        """What is logged of a step, as `Speed.figures` and `BlockStatistics.figures` return it. Collective."""
        return self.speed.figures(flops, seconds) | self._statistics.figures()

    def end(self, step: int) -> None:
        """The step with this number has been trained."""
        self._profiles.end(step)
        self._collections.after(step)
