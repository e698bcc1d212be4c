"""Runs training commands side by side, each in a process of its own that is forked from one that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NoReturn

_PATIENCE = 60  # seconds for a command to save and end


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    name: str
    code: int
    """Its exit code; negative where a signal ended it."""
    seconds: float


class Processes:
    """At most `limit` training commands at a time, each with `threads` threads and, where there are GPUs, one of them.

    A command that is still at work when this program ends is killed, however this program ends: it would otherwise
    train on beside the one that is started in its place.
    """

    def __init__(self, limit: int, threads: int, gpus: int = 0):
        self.limit, self._gpus = limit, gpus
        self._running: dict[str, tuple[ForkServerProcess, float, int]] = {}  # name -> process, since when, its slot
        # runs side by side must not spin while they wait; the server that is started now hands this on
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["mom_train.trainer", "torch._dynamo", "torch.utils.tensorboard"])
        # A signal to the whole process group, as Slurm and `timeout` send it, must not end the server. Its commands
        # are stopped one by one.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        forkserver.ensure_running()
        signal.signal(signal.SIGTERM, before)

    @property
    def names(self) -> set[str]:
        """The names of the commands that are at work."""
        return set(self._running)

    @property
    def free(self) -> int:
        """The number of commands that may be started now."""
        return self.limit - len(self._running)

    def start(self, name: str, module: str, arguments: Sequence[str], log: Path) -> None:
        """Start `python -m MODULE ARGUMENTS`, whose output is appended to the file `log`."""
        slot = min(set(range(self.limit)) - {slot for _, _, slot in self._running.values()})
        changes = {"CUDA_VISIBLE_DEVICES": gpu_of(slot, self._gpus)} if self._gpus else {}
        log.parent.mkdir(parents=True, exist_ok=True)
        process = self._context.Process(target=_work, args=(module, list(arguments), str(log), changes))
        process.start()
        self._running[name] = process, time.monotonic(), slot

    def ended(self) -> list[Ended]:
        """The commands that have ended since the last call."""
        found = []
        for name, (process, since, _) in list(self._running.items()):
            if (code := process.exitcode) is not None:
                process.join()
                del self._running[name]
                found.append(Ended(name, code, time.monotonic() - since))
        return found

    def stop(self) -> None:
        """Ask all commands to save and end, and wait until they have."""
        for process, _, _ in self._running.values():
            process.terminate()
        for process, _, _ in self._running.values():
            while process.exitcode is None:  # one that had just been forked did not hear the first signal
                process.join(_PATIENCE)
                if process.exitcode is None:
                    process.terminate()


def gpu_of(slot: int, gpus: int) -> str:
    """The GPU of a slot, as CUDA_VISIBLE_DEVICES names it. It is one of those that this program may see, such as those
    that Slurm or a user has chosen, of which there are `gpus`."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[slot % gpus] if visible else str(slot % gpus)


def _work(module: str, arguments: list[str], log: str, environment: dict[str, str]) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()  # an interrupt from the terminal is for the program that started this, which then stops its commands
    sys.stdout.flush()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    from importlib import import_module

    import_module(module).main()
    sys.exit(0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
