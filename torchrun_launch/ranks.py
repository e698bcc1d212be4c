"""The ranks of one node: torchrun as a child process, its environment, and the signals that end it.

A signal to the launcher goes to each rank once, as SIGTERM, as soon as the rank listens; torchrun itself ignores it.
The ranks then agree, save, and exit 0, torchrun with them. (torchrun's own forwarding has three gaps: a signal during
the rendezvous is lost, a rank that is still importing dies of it, and torchrun exits 1 although every rank exits 0.)
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from mom_tokenizers.errors import EXIT_FAILED, EXIT_PREEMPTED, NOT_RESTARTED
from torchrun_launch.agent import children

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_RANKLESS_SECONDS = 5.0  # between a signal and the end of a torchrun that has no ranks yet
_BARRIER_SECONDS = 60.0  # for a torchrun whose ranks have ended to hear from those of the other nodes


def rank_environment(ranks: int, cores: int, given: Mapping[str, str]) -> dict[str, str]:
    """Settings for torchrun and every rank; whatever the user has set stays."""
    wanted = {
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        # spinning OpenMP threads of several ranks slow each other down many times over
        "OMP_WAIT_POLICY": "passive",
        # page faults dominate large elementwise operations on the CPU
        "THP_MEM_ALLOC_ENABLE": "1",
        # with the shared store, a host that joins a later round waits for an address that nobody writes again, and
        # takes the others with it after 60 s
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}]: ",
    }
    return {name: value for name, value in wanted.items() if name not in given}


def rendezvous(nodes: str, endpoint: str, run_id: str, timeout: int, hosts_it: bool | None = None) -> list[str]:
    """torchrun's arguments for `nodes` ("2", or "1:4") that meet at `endpoint`, HOST:PORT.

    A host that is silent for 10 s is taken for dead. `timeout` seconds are given to all to come together, at the start
    and after a restart. `hosts_it` says whether this node holds the store; None lets torchrun find out by the address.
    """
    settings = [f"timeout={timeout}", f"join_timeout={timeout}", "last_call_timeout=5"]
    settings += ["keep_alive_interval=2", "keep_alive_max_attempt=5"]
    if hosts_it is not None:
        settings.append(f"is_host={str(hosts_it).lower()}")
    arguments = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={run_id}"]
    return [*arguments, f"--rdzv-conf={','.join(settings)}"]


def exit_code(agent_code: int, status: Mapping[str, Any] | None) -> int:
    """The launcher's exit code: 0 finished or stopped as configured, 75 preempted, 2 for an error that the user can
    mend, 3 for an incident, 1 otherwise. `status` is what this launch's ranks wrote, or None."""
    state = None if status is None else status["state"]
    if state == "preempted":
        return EXIT_PREEMPTED
    if state in ("finished", "stopped") or (agent_code == 0 and state is None):
        return 0
    return agent_code if agent_code in NOT_RESTARTED else EXIT_FAILED


class Agent:
    """torchrun on this node. `asked` is the signal that asked it to end, or None."""

    def __init__(
        self,
        torchrun: Sequence[str],
        command: Sequence[str],
        environment: Mapping[str, str],
        cwd: Path | None = None,
        log: Path | None = None,
    ):
        """Start it with torchrun's arguments and the ranks' `command`, such as -m mom_train CONFIG. With `log`, its
        output goes there as well as to this process's own."""
        self.asked: signal.Signals | None = None
        self._force = False
        for number in _STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._ask)
        pipe = subprocess.PIPE if log is not None else None
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "torchrun_launch.agent", *torchrun, *command],
            env=dict(environment),
            cwd=cwd,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,  # a terminal's Ctrl-C is for the launcher alone
            preexec_fn=_prepare_agent(),
        )
        self._copies = []
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            file = open(log, "ab", buffering=0)  # noqa: SIM115  # the copying threads write to it till the end
            for source, own in ((self._process.stdout, sys.stdout.buffer), (self._process.stderr, sys.stderr.buffer)):
                assert source is not None
                self._copies.append(threading.Thread(target=_copy, args=(source, (own, file)), daemon=True))
                self._copies[-1].start()

    def _ask(self, number: int, _: FrameType | None) -> None:
        self._force = self._force or (number == signal.SIGINT and self.asked == signal.SIGINT)
        self.asked = self.asked or signal.Signals(number)

    def wait(self, shutdown_timeout: float) -> int:
        """Until torchrun has ended; returns its exit code. Once asked to end, its ranks have `shutdown_timeout` seconds
        to save; Ctrl-C twice ends them at once."""
        told: set[int] = set()
        asked_at = ranks_at = 0.0
        while self._process.poll() is None:
            time.sleep(0.1)
            if self.asked is None:
                continue
            now = time.monotonic()
            ranks = children(self._process.pid)
            if not asked_at:
                asked_at = ranks_at = now
                print(f"torchrun_launch: {self.asked.name}: the ranks save and end", file=sys.stderr, flush=True)
            if ranks:
                ranks_at = now
            for rank in ranks - told:
                if _listens(rank):
                    _send(rank, signal.SIGTERM)
                    told.add(rank)
            rankless = _BARRIER_SECONDS if told else _RANKLESS_SECONDS
            if self._force or now - asked_at > shutdown_timeout or now - ranks_at > rankless:
                self.kill()
        for copy in self._copies:
            copy.join()
        return self._process.returncode

    def kill(self) -> None:
        """End the ranks and torchrun at once."""
        for rank in children(self._process.pid):
            _send(rank, signal.SIGKILL)
        _send(self._process.pid, signal.SIGKILL)


def _prepare_agent() -> Callable[[], None]:
    """What torchrun's process does between fork and exec, where little may be done: the rest is done here."""
    launcher = os.getpid()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        # Slurm signals every process of a step; torchrun must live until its ranks have saved
        for number in _STOP_SIGNALS[:-1]:
            signal.signal(number, signal.SIG_IGN)
        # a launcher that is killed outright must not leave ranks behind: torchrun ends them on SIGHUP
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
            if os.getppid() != launcher:  # it was killed before this asked to be told
                os._exit(1)

    return prepare


def _listens(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _copy(source: BinaryIO, targets: Sequence[BinaryIO]) -> None:
    for line in source:
        for target in targets:
            try:
                target.write(line)
                target.flush()
            except OSError:  # a reader that has gone, a full disk: neither may stop the ranks
                continue
