"""RUN/lock lets only one run train in a run_dir, as two would overwrite each other's checkpoints and figures."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mom_tokenizers.errors import UserError, user_path

log = logging.getLogger(__name__)
_BEAT_SECONDS = 5.0
_SILENT_SECONDS = 20.0  # a holder on another machine that has not touched the file for this long has ended
_REMAINS_SECONDS = 45.0  # torchrun gives its ranks 30 s to end, even after torchrun itself was killed


class RunLock:
    """Holds RUN/lock. A context manager, used by rank 0 alone.

    It is a POSIX record lock: the kernel releases it when the process ends, however that happens; forked loader workers
    do not inherit it; and network file systems keep it across machines. The file names the holder (host, pid, since).
    Its time stamp is renewed every few seconds, for file systems whose locks do not reach other machines.
    """

    def __init__(self, run_dir: Path):
        """Takes the lock. Raises UserError if another process holds it. If torchrun started that process, waits for it
        for a while first, because it may be left over from a launch that was killed."""
        self._run_dir = run_dir
        with user_path(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take()
            with user_path(run_dir / "lock"):
                self._write_holder()
        except BaseException:
            os.close(self._file)
            raise
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._renew, daemon=True, name="run-lock")
        self._beat.start()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._beat.join()
        with suppress(OSError):
            os.ftruncate(self._file, 0)  # so that the next process need not wait, even on another machine
        os.close(self._file)

    def _take(self) -> None:
        asked_at = time.monotonic()
        said = False
        while (free := self._try()) is False:
            holder = self._holder()
            if not holder.get("launched") or time.monotonic() - asked_at > _REMAINS_SECONDS:
                raise UserError(self._refusal(holder))
            if not said:
                log.warning("%s Waiting %.0f s for it to end.", self._refusal(holder), _REMAINS_SECONDS)
                said = True
            time.sleep(0.5)
        holder = self._holder()
        if not holder or (free and holder["host"] == socket.gethostname()):
            return
        log.info("waiting up to %.0f s to see whether process %s on %s still trains in %s", _SILENT_SECONDS,
                 holder["pid"], holder["host"], self._run_dir)  # fmt: skip
        renewed = os.fstat(self._file).st_mtime_ns
        while time.monotonic() - asked_at < _SILENT_SECONDS:
            time.sleep(0.5)
            self._try()  # also makes a network file system ask its server again
            if os.fstat(self._file).st_mtime_ns != renewed:
                raise UserError(self._refusal(holder))

    def _try(self) -> bool | None:
        """Whether this process holds the lock now. None if the file system does not support locks."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return None
            raise
        return True

    def _holder(self) -> dict[str, Any]:
        """The holder that the file names, or {} if the file is empty or half written."""
        try:
            holder = json.loads(os.pread(self._file, 1 << 12, 0))
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) and {"host", "pid"} <= holder.keys() else {}

    def _write_holder(self) -> None:
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "launched": "TORCHELASTIC_RUN_ID" in os.environ,
        }
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{json.dumps(holder)}\n".encode(), 0)

    def _renew(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._file)

    def _refusal(self, holder: dict[str, Any]) -> str:
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        since = f" since {holder['since']}" if "since" in holder else ""
        return (
            f"{self._run_dir}: {who} has been training there{since}, and two would overwrite each other's checkpoints. "
            f"End that one first (python -m torchrun_launch cancel {self._run_dir}, or kill {holder.get('pid', 'PID')} "
            "there: it saves and ends), or use another run_dir."
        )
