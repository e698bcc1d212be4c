"""How commands write what they have found: as JSON for programs, as Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from mom_tokenizers.errors import write_text


def write_json(out: str | None, figures: Any, indent: int | None = 1) -> bool:
    """Write `figures` as --json asks for: to the file `out`, or to standard output where `out` is "-". Where it is
    None, nothing is written. Returns whether standard output is still free for a text. Raises UserError where the file
    cannot be written."""
    if out is not None:
        write_text(out, json.dumps(figures, indent=indent) + "\n")
    return out != "-"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that is readable as plain text. The first `left` columns are aligned left. The others hold
    figures and are aligned right."""
    align = ["left"] * left + ["right"] * (len(header) - left)
    return tabulate(rows, header, tablefmt="pipe", colalign=align, disable_numparse=True)
