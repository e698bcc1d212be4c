"""Exit codes, the one channel for mistakes that a user can mend, and how a program ends when something fails.

This module stands in the lowest package, so that every package can raise `UserError`.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

EXIT_FAILED = 1
"""Something failed that is no user's mistake: a bug, the machine, another rank. Starting again may help."""
EXIT_USER_ERROR = 2
"""The message says what the user can mend. Starting again without that would end in the same way."""
EXIT_INCIDENT = 3
"""Training steps stayed bad (incident.json). Starting again would end in the same way."""
EXIT_PREEMPTED = 75
"""The run was asked to end and has saved everything. Starting again carries on. (EX_TEMPFAIL)"""
NOT_RESTARTED = (EXIT_USER_ERROR, EXIT_INCIDENT)
"""Codes after which no launcher starts the ranks again."""

_MENDABLE = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EINVAL),
}


class UserError(ValueError):
    """A mistake that the user can mend: the message says what is wrong, where, and what to do.

    It is a ValueError, so that code which tries a thing and falls back need not know of users.
    """


class AgreedError(UserError):
    """A UserError that all ranks of a distributed program raise with the same message, so that rank 0 alone says it."""


def mendable(error: BaseException) -> bool:
    """Whether a user can mend it: a UserError, or an OSError such as no such file, no permission, no space."""
    known = (UserError, FileNotFoundError, PermissionError)  # an object store's client gives the latter two no number
    return isinstance(error, known) or (isinstance(error, OSError) and error.errno in _MENDABLE)


@contextmanager
def user_path(path: str | os.PathLike[str]) -> Iterator[None]:
    """A block that opens, reads or writes `path`, which a user has named.

    An OSError that the user can mend (no such file, no permission, no space, ...) becomes a UserError that names the
    path and the reason. Other ones, such as an input/output error or a network that is away, stay as they are.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from error
    except OSError as error:
        if not mendable(error):
            raise
        reason = (
            (error.strerror or str(error) or type(error).__name__).replace("No such", "no such").replace("Is a", "is a")
        )
        raise UserError(f"{error.filename or path}: {reason}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a user's JSON file. Raises UserError where it cannot be opened or is not valid JSON."""
    with user_path(path):
        text = Path(path).read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write what a user asked for to the place that the user named, "-" being standard output. Raises UserError where
    that cannot be written."""
    if str(path) == "-":
        sys.stdout.write(text)
        return
    with user_path(path):
        Path(path).write_text(text, encoding="utf-8")


@contextmanager
def exit_clearly(program: str) -> Iterator[None]:
    """The end of a program: a UserError becomes one message on stderr and exit code 2.

    Every other exception keeps its traceback and ends the program with exit code 1. One rank of several says which rank
    it is, and ends at once, because the others may be waiting for it in a collective. MOM_DEBUG=1 gives a UserError's
    traceback as well.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    prefix = f"[rank {rank}] " if rank else ""
    try:
        yield
    except UserError as error:
        if os.environ.get("MOM_DEBUG"):
            traceback.print_exc()
        if rank == 0 or not isinstance(error, AgreedError):
            print(f"{program}: error: {prefix}{error}", file=sys.stderr)
        if ranks > 1:
            end_at_once(EXIT_USER_ERROR)
        raise SystemExit(EXIT_USER_ERROR) from None
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at its end
        raise SystemExit(EXIT_FAILED) from None
    except Exception:
        if ranks == 1:
            raise
        print(f"{program}: {prefix}failed:\n{traceback.format_exc()}", file=sys.stderr)
        end_at_once(EXIT_FAILED)


def end_at_once(code: int) -> NoReturn:
    """End this process without its destructors: those of a process group can wait for the other ranks."""
    for process in multiprocessing.active_children():
        process.terminate()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _reader_has_left() -> bool:
    """Whether standard output is the pipe that broke, as of `program | head`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    except (OSError, ValueError):
        pass
    return False
