"""Garbage collections of Python at chosen steps, the same on all ranks."""

from __future__ import annotations

import gc


class Collections:
    """Collects garbage every so many steps instead of whenever Python wants to. A context manager.

    Whenever one rank pauses to collect, the others wait for it, so it costs less if all pause together. What exists
    when the context is entered is left out of the collections, which makes each of them complete and still fast. With
    `every` None everything is left to Python.
    """

    def __init__(self, every: int | None):
        self._every = every

    def __enter__(self) -> Collections:
        if self._every is not None:
            gc.collect()
            gc.freeze()
            gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        if self._every is not None:
            gc.unfreeze()
            gc.enable()

    def after(self, step: int) -> None:
        """The step with this number has ended."""
        if self._every is not None and step % self._every == 0:
            gc.collect()
