"""Exit codes, the exception for mistakes that a user can mend, and how a program ends when something fails.

This module is in the lowest package, so that every package can raise `UserError`.
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
"""Something failed that is not the user's mistake: a bug, the machine, another rank. Starting again may help."""
EXIT_USER_ERROR = 2
"""A user's mistake; the message says how to mend it. Without that, starting again would end in the same way."""
EXIT_INCIDENT = 3
"""Training ended because steps stayed bad (see incident.json). Starting again would end in the same way."""
EXIT_PREEMPTED = 75
"""The run was asked to end and has saved everything. Starting it again continues it. (EX_TEMPFAIL of sysexits.h)"""
NOT_RESTARTED = (EXIT_USER_ERROR, EXIT_INCIDENT)
"""Codes after which no launcher starts the ranks again."""

_MENDABLE = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EINVAL),
}


class UserError(ValueError):
    """A mistake that the user can mend. The message says what is wrong, where, and what to do.

    It is a ValueError, so that code which tries something and falls back can catch it as one.
    """


class AgreedError(UserError):
    """A UserError that all ranks of a distributed program raise with the same message, so that only rank 0 prints
    it."""


def mendable(error: BaseException) -> bool:
    """Whether a user can mend the error: a UserError, or an OSError such as no such file, no permission, no space."""
    known = (UserError, FileNotFoundError, PermissionError)  # clients of object stores raise these without an errno
    return isinstance(error, known) or (isinstance(error, OSError) and error.errno in _MENDABLE)


@contextmanager
def user_path(path: str | os.PathLike[str]) -> Iterator[None]:
    """A context for code that opens, reads or writes `path`, which a user has named.

    An OSError that the user can mend (no such file, no permission, no space, ...) becomes a UserError that names the
    path and the reason. Other errors, such as an input/output error or a lost network, stay as they are.
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
    """Write text to a path that the user named; "-" means standard output. Raises UserError where it cannot be
    written."""
    if str(path) == "-":
        sys.stdout.write(text)
        return
    with user_path(path):
        Path(path).write_text(text, encoding="utf-8")


@contextmanager
def exit_clearly() -> Iterator[None]:
    """A context for the whole of a program. It turns a UserError into one message on stderr and exit code 2.

    The message begins with the program's name as argparse has it: what was typed, such as "mom plan" or "plan_run.py".

    Every other exception keeps its traceback and ends the program with exit code 1. A rank of a distributed program
    also prints its number, and ends at once, because the other ranks may be waiting for it in a collective. With
    MOM_DEBUG=1 the traceback of a UserError is printed as well.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    prefix = f"[rank {rank}] " if rank else ""
    path = Path(sys.argv[0])
    program = path.parent.name if path.name == "__main__.py" else path.name
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's last flush succeeds
        raise SystemExit(EXIT_FAILED) from None
    except Exception:
        if ranks == 1:
            raise
        print(f"{program}: {prefix}failed:\n{traceback.format_exc()}", file=sys.stderr)
        end_at_once(EXIT_FAILED)


def end_at_once(code: int) -> NoReturn:
    """End this process without running destructors, because those of a process group may wait for the other ranks."""
    for process in multiprocessing.active_children():
        process.terminate()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _reader_has_left() -> bool:
    """Whether the broken pipe is standard output, as with `program | head`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    except (OSError, ValueError):
        pass
    return False
