"""The one channel for mistakes that a user can mend, and how a program ends when it meets one.

This module stands in the lowest package, so that every package can raise `UserError`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """A mistake that the user can mend: the message says what is wrong, where, and what to do.

    It is a ValueError, so that code which tries a thing and falls back need not know of users.
    """


@contextmanager
def exit_clearly(program: str) -> Iterator[None]:
    """Turn ValueError and OSError into one message on stderr and exit code 2.

    Set MOM_DEBUG=1 for the traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("MOM_DEBUG"):
            raise
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        else:
            text = str(error)
        print(f"{program}: error: {text}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
