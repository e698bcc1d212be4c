"""Starts the ranks of one node: torchrun as a child process, its environment, and the signals that end it.

A signal to the launcher is passed on to each rank once, as SIGTERM, as soon as the rank has a handler for it; torchrun
itself ignores the signal. The ranks then agree on a step, save, and exit with code 0, and torchrun does the same.
(torchrun's own forwarding has three faults: a signal during the rendezvous is lost, a rank that is still importing is
killed by it, and torchrun exits with code 1 although every rank exits with 0.)
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
_RANKLESS_SECONDS = 5.0  # after a signal, a torchrun that has no ranks yet is killed after this time
_BARRIER_SECONDS = 60.0  # after its ranks have ended, torchrun may wait this long for the other nodes


def rank_environment(ranks: int, cores: int, given: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for torchrun and every rank. What the user has set in `given` is left as it is."""
    wanted = {
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        # Spinning OpenMP threads of several ranks make each other many times slower.
        "OMP_WAIT_POLICY": "passive",
        # Huge pages: page faults otherwise dominate large elementwise operations on the CPU.
        "THP_MEM_ALLOC_ENABLE": "1",
        # With the shared store, a host that joins a later round waits for an address that nobody writes again, and
        # after 60 s all hosts fail.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}]: ",
    }
    return {name: value for name, value in wanted.items() if name not in given}


def rendezvous(nodes: str, endpoint: str, run_id: str, timeout: int, hosts_it: bool | None = None) -> list[str]:
    """The arguments of torchrun for `nodes` machines ("2", or "1:4") that meet at `endpoint`, HOST:PORT.

    A host that is silent for 10 s is taken for dead. All hosts must come together within `timeout` seconds, at the
    start and after a restart. `hosts_it` says whether this node holds the store; with None, torchrun decides by the
    address.
    """
    settings = [f"timeout={timeout}", f"join_timeout={timeout}", "last_call_timeout=5"]
    settings += ["keep_alive_interval=2", "keep_alive_max_attempt=5"]
    if hosts_it is not None:
        settings.append(f"is_host={str(hosts_it).lower()}")
    arguments = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={run_id}"]
    return [*arguments, f"--rdzv-conf={','.join(settings)}"]


def exit_code(agent_code: int, status: Mapping[str, Any] | None) -> int:
    """The launcher's exit code: 0 where the run has finished or stopped as configured, 75 where it was preempted, 2 for
    an error that the user can mend, 3 for an incident, and 1 otherwise. `status` is what the ranks of this launch
    wrote, or None."""
    state = None if status is None else status["state"]
    if state == "preempted":
        return EXIT_PREEMPTED
    if state in ("finished", "stopped") or (agent_code == 0 and state is None):
        return 0
    return agent_code if agent_code in NOT_RESTARTED else EXIT_FAILED


class Agent:
    """The process of torchrun on this node. `asked` is the signal that asked it to end, or None."""

    def __init__(
        self,
        torchrun: Sequence[str],
        command: Sequence[str],
        environment: Mapping[str, str],
        cwd: Path | None = None,
        log: Path | None = None,
    ):
        """Start torchrun with its arguments and the ranks' `command`, such as -m mom_train CONFIG. With `log`, its
        output is written to that file as well as to this process's own output."""
        self.asked: signal.Signals | None = None
        self._force = False
        for number in _STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup makes a process ignore SIGHUP, which is kept
                signal.signal(number, self._ask)
        pipe = subprocess.PIPE if log is not None else None
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "torchrun_launch.agent", *torchrun, *command],
            env=dict(environment),
            cwd=cwd,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,  # so that Ctrl-C in a terminal reaches only the launcher
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
        """Wait until torchrun has ended, and return its exit code. Once asked to end, its ranks have `shutdown_timeout`
        seconds to save. A second Ctrl-C kills them at once."""
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
        """Kill the ranks and torchrun at once."""
        for rank in children(self._process.pid):
            _send(rank, signal.SIGKILL)
        _send(self._process.pid, signal.SIGKILL)


def _prepare_agent() -> Callable[[], None]:
    """A function that the process of torchrun calls between fork and exec. Little is allowed there, so everything else
    is prepared here."""
    launcher = os.getpid()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        # Slurm signals every process of a step, but torchrun must live until its ranks have saved.
        for number in _STOP_SIGNALS[:-1]:
            signal.signal(number, signal.SIG_IGN)
        # A launcher that is killed must not leave ranks behind: the kernel then sends SIGHUP, on which torchrun ends
        # them.
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
            if os.getppid() != launcher:  # the launcher was killed before the call of prctl
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
            except OSError:  # neither a closed pipe nor a full disk may stop the ranks
                continue
