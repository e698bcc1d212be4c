"""How a program ends when its user, not its author, made the mistake."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2


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
