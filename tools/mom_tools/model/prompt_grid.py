"""Many samples as one page and one contact sheet, for `mom generate --grid`.

OUT/grid.html         all samples, under their prompts, with pictures and play buttons; it needs no other file
OUT/grid.png          all pictures with their captions; grid-2.png and so on where there are more than 400
OUT/grid.jsonl        what has been drawn, and with which settings: a command that was ended goes on after it
OUT/sample-N.md, ...  the samples, as `mom generate` writes them without --grid
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mom_tokenizers.errors import user_path, write_text
from mom_tools.compare.page import parts_of, rendered

RECORD = "grid.jsonl"
_PAGE_SECONDS = 30.0  # after which the page is written again


@dataclass(frozen=True)
class Job:
    """One sample: the text that it begins with, the shape of its picture where one is given, and its seed."""

    prompt: str
    shape: str | None
    seed: int

    def caption(self, jobs: Sequence[Job]) -> str:
        """What tells the sample apart from the others: its prompt, and the shape and seed where these differ."""
        more = [self.shape] if self.shape is not None else []
        more += [f"seed {self.seed}"] if len({job.seed for job in jobs}) > 1 else []
        return (self.prompt or "no prompt") + (f" ({', '.join(more)})" if more else "")


class Record:
    """Which samples a folder holds. They count only where they were drawn with the same settings."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.file = folder / RECORD
        self.names: dict[Job, str] = {}
        settings = json.loads(json.dumps(settings))  # as a file gives them back
        lines = self._lines()
        self.unlike = [] if not lines else [key for key in settings if lines[0].get(key) != settings[key]]
        """The settings that earlier samples of the folder were drawn with another value of, so that none counts."""
        if lines and not self.unlike:
            for line in lines[1:]:
                if (folder / f"{line['name']}.md").is_file():
                    self.names[Job(line["prompt"], line["shape"], line["seed"])] = line["name"]
        with user_path(self.file):
            kept = [settings, *(asdict(job) | {"name": name} for job, name in self.names.items())]
            self.file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._next = 1 + max((int(name.rpartition("-")[2]) for name in self.names.values()), default=-1)

    def _lines(self) -> list[dict[str, Any]]:
        if not self.file.is_file():
            return []
        lines = []
        for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # the end of a file whose writer was killed
                break
        return lines

    def new_name(self) -> str:
        self._next += 1
        return f"sample-{self._next - 1}"

    def add(self, job: Job, name: str) -> None:
        self.names[job] = name
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(job) | {"name": name}) + "\n")


def draw_grid(
    folder: Path, jobs: Sequence[Job], settings: dict[str, Any], title: str, draw: Callable[[Job, str], object]
) -> None:
    """Draws the jobs that the folder does not hold yet with `draw(job, name)`, which writes NAME.md and its files, and
    writes the page and the contact sheet. The page is also written on the way and when the command is ended."""
    record = Record(folder, settings)
    if record.unlike:
        print(f"{folder}: earlier samples had other settings ({', '.join(record.unlike)}), so all are drawn again")
    missing = [job for job in dict.fromkeys(jobs) if job not in record.names]
    if done := len(set(jobs)) - len(missing):
        print(f"{folder}: {done} of {len(set(jobs))} samples are there already")
    written = time.monotonic()
    try:
        for job in tqdm(missing, desc="samples", unit="sample", disable=not sys.stderr.isatty()):
            name = record.new_name()
            draw(job, name)
            record.add(job, name)
            if time.monotonic() - written > _PAGE_SECONDS:
                write_page(folder, jobs, record.names, settings, title)
                written = time.monotonic()
    finally:
        write_page(folder, jobs, record.names, settings, title)
    sheets = write_sheets(folder, jobs, record.names)
    print(f"{folder / 'grid.html'}: {len(jobs)} samples")
    for sheet in sheets:
        print(sheet)
    if not sheets:
        print("no contact sheet, for no sample has a picture")


def write_page(folder: Path, jobs: Sequence[Job], names: dict[Job, str], settings: dict[str, Any], title: str) -> None:
    """Writes grid.html of the samples that there are."""
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    prompts: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        name = names.get(job)
        parts: list[dict[str, Any]] = []
        if name is not None:
            text = files[f"{name}.md"].read_text(encoding="utf-8")
            # The prompt, with which the file begins, is the heading.
            text = text.removeprefix(f"> {job.prompt}\n") if job.prompt else text
            parts = [part for part, _ in parts_of(text, files, f"{name}.md")]
        said = ([f"shape {job.shape}"] if job.shape is not None else []) + [f"seed {job.seed}"]
        prompts.setdefault(job.prompt, []).append({"note": ", ".join([name or "not yet drawn", *said]), "parts": parts})
    html = rendered(
        Path(__file__).parents[1] / "compare/grid.html",
        title=title, settings=settings, prompts=prompts, count=len(jobs), drawn=sum(job in names for job in jobs),
    )  # fmt: skip
    write_text(folder / "grid.html", html)


def write_sheets(folder: Path, jobs: Sequence[Job], names: dict[Job, str]) -> list[Path]:
    """Writes grid.png of all pictures, and returns the files: none where there are no pictures."""
    from PIL import Image

    from mom_train.generate.contact_sheet import MOST, contact_sheet

    each = [[folder / f for f in _pictures(folder, names[job])] for job in jobs]
    if not any(each):
        return []
    nothing: list[Path | None] = [None]  # leaves the sample's place empty
    tiles = [(file, job.caption(jobs)) for job, files in zip(jobs, each, strict=True) for file in files or nothing]
    # Where every sample has one picture, the samples of a prompt make a row.
    row = len(jobs) // len({job.prompt for job in jobs})
    columns = row if len(tiles) == len(jobs) and 1 < row <= 12 else None
    most = MOST // columns * columns if columns else MOST
    written = []
    for start in range(0, len(tiles), most):
        pictures = [(None if f is None else Image.open(f), caption) for f, caption in tiles[start : start + most]]
        written.append(folder / ("grid.png" if start == 0 else f"grid-{start // most + 1}.png"))
        contact_sheet(pictures, columns).save(written[-1])
    return written


def _pictures(folder: Path, name: str) -> list[str]:
    """The names of the pictures of a sample, in the order of its document."""
    files = {path.name: path for path in folder.glob(f"{name}-*.png")}
    text = (folder / f"{name}.md").read_text(encoding="utf-8")
    return [linked for _, linked in parts_of(text, files, name) if linked is not None]
