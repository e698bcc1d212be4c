"""What a part of `mom gpu-check` has found so far. It is written to the part's file after every row, so that a part
that crashes, hangs or is killed leaves what it had done."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROFILE = "Where the time goes"
"""How the titles of tables begin that list the kernels of a step."""


def write_whole(file: Path, text: str) -> None:
    """Replace the content of a file in one step: whoever reads it sees the old text or the new one, never a half."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


class Findings:
    """The tables, notes and failures of one part, and the time and place that it has."""

    def __init__(self, file: Path, scratch: Path, device: str, tiny: bool, seconds: float):
        """`file` is where the findings are written as JSON, `scratch` a folder for anything else. `device` is "cuda"
        or "cpu". `tiny` asks for sizes that test the command and measure nothing. The part is killed after
        `seconds`."""
        self.file, self.scratch, self.device, self.tiny = file, scratch, device, tiny
        self._end = time.monotonic() + seconds
        self.found: dict[str, Any] = {"tables": {}, "notes": [], "wrong": [], "left_out": [], "figures": {}}
        self._write()

    def row(self, table: str, **cells: str) -> None:
        """Add a row to the table of this title. The names of the cells are the columns."""
        self.found["tables"].setdefault(table, []).append(cells)
        self._write()

    def figure(self, name: str, value: Any) -> None:
        """Keep a value, such as a float or a dict of floats, in the JSON file only."""
        self.found["figures"][name] = value
        self._write()

    def note(self, text: str) -> None:
        """Say something about what was found, in a whole sentence."""
        self.found["notes"].append(text)
        self._write()

    def wrong(self, text: str) -> None:
        """Say what is not as it must be. In a part about correctness, the exit code of the command is 1 then."""
        self.found["wrong"].append(text)
        self._write()

    def left_out(self, what: str, why: str) -> None:
        """Say what was not done, and why."""
        self.found["left_out"].append(f"{what}: {why}")
        self._write()

    def seconds_left(self) -> float:
        """Seconds until this part is killed."""
        return self._end - time.monotonic()

    def time_for(self, what: str, seconds: float) -> bool:
        """Whether about `seconds` are left. If not, `what` is listed as left out."""
        if self.seconds_left() >= seconds:
            return True
        self.left_out(what, "no time left")
        return False

    def _write(self) -> None:
        write_whole(self.file, json.dumps(self.found, indent=1) + "\n")


def read_findings(file: Path) -> dict[str, Any]:
    """What a part has written so far, or nothing found if it has written nothing."""
    if not file.is_file():
        return {"tables": {}, "notes": [], "wrong": [], "left_out": [], "figures": {}}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def table_of(rows: Sequence[dict[str, str]]) -> str:
    """Rows of a table of findings as Markdown. A cell that a row does not have is empty."""
    from mom_tools.output import markdown_table  # here, because it needs tabulate, which may be missing

    header = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, "") for name in header] for row in rows]
    figures = [all(row[column][:1] in "0123456789-" for row in cells) for column in range(len(header))]
    left = next((column for column in range(len(header)) if all(figures[column:])), len(header))
    return markdown_table(header, cells, max(left, 1))
