"""Writes documents with every picture and recording twice: as it was, and as the tokens bring it back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import soundfile

from mom_data.documents.document import Document, documents_at_the_head
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import UserError
from mom_tokenizers.media.pictures import decode_image
from mom_tokenizers.media.recordings import decode_audio

FOLDER = "round_trip"
"""The folder in a run that `mom report` shows as "Before and after the tokenizers"."""
_EACH = 4  # documents for each modality
_LOOKED_AT = 1000  # documents
_MOST_TEXT = 600  # characters of one piece


def write_round_trips(run: Path, tokenizers: Tokenizers, files: list[Path]) -> int:
    """Write some documents of `files` that have pictures or speech to RUN/round_trip, as document-K.md with PNG and WAV
    files. Returns how many there are. A modality without a tokenizer, or without a decoder, is left out."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    written = 0
    for written, document in enumerate(chosen(files, [m for m in tokenizers.modalities if m != "text"]), 1):
        name = f"document-{written - 1}"
        (folder / f"{name}.md").write_text("\n\n".join(_lines(document, tokenizers, folder, name)) + "\n")
    return written


def chosen(files: list[Path], modalities: Sequence[str]) -> Iterator[Document]:
    """The first documents that hold each of the modalities, four for each, so that one that is rare is shown as well.
    Only so many documents at the beginning of all files are looked at."""
    missing = dict.fromkeys(modalities, _EACH)
    for document in islice(chain.from_iterable(map(documents_at_the_head, files)), _LOOKED_AT):
        if not any(missing.values()):
            return
        if not isinstance(document, Document):
            continue
        held = {s.modality for s in document.segments} & missing.keys()
        if any(missing[m] for m in held):
            missing |= {m: max(0, missing[m] - 1) for m in held}
            yield document


def _lines(document: Document, tokenizers: Tokenizers, folder: Path, name: str) -> list[str]:
    lines = []
    for place, segment in enumerate(document.segments):
        if isinstance(segment.data, str):
            lines.append(segment.data[:_MOST_TEXT] + ("..." if len(segment.data) > _MOST_TEXT else ""))
            continue
        if segment.modality not in tokenizers.modalities:
            continue
        tokenizer = tokenizers.tokenizer(segment.modality)
        before, after = (f"{name}-{place}-{side}" for side in ("original", "decoded"))
        try:
            if segment.modality == "image":
                picture = decode_image(segment.data)
                tokenizer.decode(tokenizer.encode(picture)).save(folder / f"{after}.png")
                picture.save(folder / f"{before}.png")
                lines += [f"![original]({before}.png)", f"![from its tokens]({after}.png)"]
            elif segment.modality == "speech":
                recording = decode_audio(segment.data)
                soundfile.write(folder / f"{before}.wav", *recording)
                soundfile.write(folder / f"{after}.wav", *tokenizer.decode(tokenizer.encode(recording)))
                lines += [f"[original]({before}.wav)", f"[from its tokens]({after}.wav)"]
        except UserError as error:  # such as units without a vocoder
            lines.append(f"({segment.modality}: {error})")
    return lines
