"""Build a small real corpus from what the machine already holds, without a download.

Text: the Python language reference and the documentation of installed packages. Pictures: scikit-learn's
1,797 handwritten digits. Speech: captions, sums and sentences spoken by espeak-ng.
Written as raw WebDataset shards in the "segments" convention of `mom_data.documents.document`.

    mom demo-corpus --output DIR
"""

from __future__ import annotations

import ast
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from PIL import Image
from tqdm import tqdm

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.options import command_parser

DOCUMENTED_PACKAGES = ("scipy", "sklearn", "numpy")
SAMPLE_RATE = 16_000
PICTURE_SIDE = 32
TRAIN_SHARDS = 4
VALIDATION_SHARE = 0.04
# Shares of the documents, the rest being plain text: one digit, three digits with their sum, spoken sentence.
DIGIT_SHARE, SUM_SHARE, SPOKEN_SHARE = 0.375, 0.12, 0.10

VOICES = ("en-us", "en-gb-scotland", "en-us+f2", "en-029", "en-us+m3", "en-gb-scotland+f4", "en-us-nyc")
WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "twenty-one"),
    *("twenty-two", "twenty-three", "twenty-four", "twenty-five", "twenty-six", "twenty-seven"),
]
# Name of the pen -> colours of ink and ground.
PENS = {
    "in black ink": ((10, 10, 10), (255, 255, 255)),
    "in blue ink": ((20, 50, 190), (255, 255, 255)),
    "in red ink": ((200, 25, 30), (255, 255, 255)),
    "in white chalk": ((245, 245, 245), (20, 25, 25)),
}
CAPTIONS = (
    "A handwritten {word}, {pen}.",
    "The digit {number}, written by hand {pen} with {stroke} strokes.",
    "Somebody wrote the number {word} {pen}.",
    "This picture shows a {stroke} {word} {pen}.",
    "{Word} is {parity} number; here it is, {pen}.",
    "A {stroke} handwritten {number} {pen}.",
)
SUMS = (
    "Three digits: {a}, {b} and {c}. Together they make {total}.",
    "{A} plus {b} plus {c} is {total}.",
    "Here are {a}, {b} and {c}; their sum is {total}.",
)
SENTENCE = re.compile(r"(?<![^\s])[A-Z][a-z]+(?: [A-Za-z',-]+){5,17}\.(?=\s|$)")


@dataclass(frozen=True)
class Settings:
    documents: int
    seed: int
    version: int = 1  # raise when the same settings would build another corpus


@dataclass(frozen=True)
class Speech:
    text: str
    voice: str
    words_per_minute: int
    pitch: int


@dataclass(frozen=True)
class Picture:
    digit: int  # row of load_digits()
    pen: str


Planned = tuple["str | Picture | Speech", ...]


# ------------------------------------------------------------------------------------------------- text


def _docstrings(package: str) -> list[str]:
    """Docstrings of a package's modules, classes and functions, in file order, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return []
    texts = []
    for file in sorted(Path(spec.origin).parent.rglob("*.py")):
        if "tests" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.append(ast.get_docstring(node) or "")
    return texts


def _manuals() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
    found = {d.metadata["Name"]: d for d in importlib.metadata.distributions() if d.metadata["Name"]}
    for name in sorted(found):
        yield str(found[name].metadata["Description"] or "")


def _paragraphs(texts: Iterable[str], seen: set[bytes]) -> Iterator[list[str]]:
    """The paragraphs of prose of each text. Tables, code, and paragraphs that were seen before are left out."""
    for text in texts:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
            paragraph = paragraph.strip("\n")
            letters = sum(c.isalpha() or c == " " for c in paragraph)
            digest = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=8).digest()
            if len(paragraph) >= 40 and letters >= 0.78 * len(paragraph) and digest not in seen:
                seen.add(digest)
                kept.append(paragraph)
        if kept:
            yield kept


def collect_chunks(sources: Iterable[list[str]], rng: random.Random) -> list[str]:
    """Chunks of 300 to about 3,000 characters, in shuffled order. Paragraphs stay whole, and each is used once."""
    chunks = []
    seen: set[bytes] = set()
    for texts in sources:
        chunk: list[str] = []
        wanted = rng.randint(300, 3000)
        for paragraphs in _paragraphs(texts, seen):
            for paragraph in paragraphs:
                chunk.append(paragraph[:4000])
                if sum(map(len, chunk)) >= wanted:
                    chunks.append("\n\n".join(chunk))
                    chunk, wanted = [], rng.randint(300, 3000)
    rng.shuffle(chunks)
    return chunks


# ------------------------------------------------------------------------------------------------- plan


def _voice(text: str, rng: random.Random) -> Speech:
    return Speech(text, rng.choice(VOICES), rng.randrange(150, 211, 10), rng.randrange(35, 66, 5))


def caption(digit: int, stroke: str, pen: str, rng: random.Random) -> str:
    word = WORDS[digit]
    parity = "an even" if digit % 2 == 0 else "an odd"
    fields = {
        "word": word,
        "Word": word.capitalize(),
        "number": digit,
        "pen": pen,
        "stroke": stroke,
        "parity": parity,
    }
    return rng.choice(CAPTIONS).format(**fields)


def plan_documents(
    number: int, pictures: list[int], targets: np.ndarray, strokes: list[str], chunks: list[str], seed: int
) -> list[Planned]:
    """`number` documents made of the given pictures and text chunks, in shuffled order. The result depends on nothing
    but the arguments."""
    rng = random.Random(seed)

    def one_digit(i: int) -> Planned:
        picture = Picture(pictures[i % len(pictures)], rng.choice(list(PENS)))
        words = caption(int(targets[picture.digit]), strokes[picture.digit], picture.pen, rng)
        spoken = _voice(words, rng)
        orders: list[Planned] = [(words, picture), (picture, words), (spoken, picture), (picture, spoken)]
        orders += [(words, spoken, picture), (picture, words, spoken)]
        return rng.choice(orders)

    def three_digits(i: int) -> Planned:
        shown = [Picture(pictures[(3 * i + k) % len(pictures)], rng.choice(list(PENS))) for k in range(3)]
        digits = [int(targets[p.digit]) for p in shown]
        a, b, c = (WORDS[d] for d in digits)
        said = rng.choice(SUMS).format(a=a, A=a.capitalize(), b=b, c=c, total=WORDS[sum(digits)])
        written = f"{digits[0]} + {digits[1]} + {digits[2]} = {sum(digits)}"
        if rng.random() < 0.5:
            return (*shown, written, _voice(said, rng))
        return (_voice(said, rng), shown[0], "+", shown[1], "+", shown[2], f"= {sum(digits)}")

    singles, sums = round(number * DIGIT_SHARE), round(number * SUM_SHARE)
    documents = [one_digit(i) for i in range(singles)] + [three_digits(i) for i in range(sums)]
    to_speak = round(number * SPOKEN_SHARE)
    for chunk in chunks[: number - singles - sums]:
        sentences = SENTENCE.findall(chunk) if to_speak else []
        if sentences:
            to_speak -= 1
            spoken = _voice(rng.choice(sentences), rng)
            documents.append((chunk, spoken) if rng.random() < 0.6 else (spoken, chunk))
        else:
            documents.append((chunk,))
    rng.shuffle(documents)
    return documents


# ----------------------------------------------------------------------------------------------- render


class Espeak:
    """The speech synthesiser espeak-ng, through its C interface.

    A process may have only one, because the library keeps a state that changes its sound and that even a restart of the
    library does not clear. The same texts in the same order sound the same in every fresh process.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise UserError("espeak-ng, which speaks the corpus, is missing: pip install espeakng-loader") from None
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate = self.library.espeak_Initialize(2, 0, str(espeakng_loader.get_data_path()).encode(), 0)
        if self.rate <= 0:
            raise UserError("espeak-ng does not start: pip install --force-reinstall espeakng-loader")
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # by default the time of day
        ctypes.CDLL(None).srand(1)
        self.chunks: list[np.ndarray] = []
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = signature(self._receive)  # kept: ctypes does not
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def flac(self, speech: Speech) -> bytes:
        """The text spoken, as FLAC bytes: mono, 16 bits, 16 kHz."""
        self.chunks.clear()
        if self.library.espeak_SetVoiceByName(speech.voice.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {speech.voice!r}")
        self.library.espeak_SetParameter(1, speech.words_per_minute, 0)
        self.library.espeak_SetParameter(3, speech.pitch, 0)
        text = speech.text.encode()
        self.library.espeak_Synth(text, len(text) + 1, 0, 0, 0, 1, None, None)  # flag 1: the text is UTF-8
        self.library.espeak_Synchronize()
        samples = soxr.resample(np.concatenate(self.chunks).astype(np.float32) / 32768, self.rate, SAMPLE_RATE)
        file = io.BytesIO()
        soundfile.write(file, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        return file.getvalue()


def png(pixels: np.ndarray, pen: str) -> bytes:
    """A digit as the PNG of an RGB picture of 32 x 32 pixels, enlarged smoothly from 8 x 8 values between 0 (no ink)
    and 16."""
    ink, ground = (np.array(colour, np.float32) for colour in PENS[pen])
    grey = Image.fromarray((pixels / 16 * 255).round().astype(np.uint8))
    amount = (
        np.asarray(grey.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    )
    file = io.BytesIO()
    Image.fromarray((ground + (ink - ground) * amount).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


Rendered = tuple[list[dict[str, Any]], dict[str, float]]


def render(job: tuple[str, list[Planned], np.ndarray]) -> Rendered:
    """WebDataset samples and their counts, from (key prefix, documents, load_digits().images)."""
    prefix, documents, pixels = job
    espeak = Espeak()
    counts = dict.fromkeys(("documents", "characters", "images", "recordings", "speech_seconds"), 0.0)
    samples = []
    for number, document in enumerate(documents):
        sample: dict[str, Any] = {"__key__": f"{prefix}{number:06d}"}
        segments: list[dict[str, str]] = []
        for place, piece in enumerate(document):
            if isinstance(piece, str):
                segments.append({"type": "text", "text": piece})
                counts["characters"] += len(piece)
                continue
            if isinstance(piece, Picture):
                kind, part, data = "image", f"{place}.png", png(pixels[piece.digit], piece.pen)
                counts["images"] += 1
            else:
                kind, part, data = "speech", f"{place}.flac", espeak.flac(piece)
                counts["recordings"] += 1
                counts["speech_seconds"] += soundfile.info(io.BytesIO(data)).duration
            segments.append({"type": kind, "part": part})
            sample[part] = data
        sample["json"] = json.dumps({"segments": segments}, ensure_ascii=False).encode()
        samples.append(sample)
        counts["documents"] += 1
    return samples, counts


# ------------------------------------------------------------------------------------------------- build


def build_corpus(output: Path, settings: Settings, workers: int) -> dict[str, Any]:
    """Build the corpus, or find it finished. Returns its summary.

    Raises ValueError when espeak-ng is missing or `output` holds something else.
    """
    summary_file = output / "summary.json"
    if summary_file.exists():
        summary = json.loads(summary_file.read_text())
        if summary["settings"] == asdict(settings):
            return summary
    elif output.exists() and any(p.name != ".partial" for p in output.iterdir()):
        raise UserError(f"{output} holds files that are not a demo corpus: give another --output")
    Espeak()
    # here, not above: they import torch and scipy, which the workers would wait for
    from sklearn.datasets import load_digits
    from webdataset import TarWriter

    digits = load_digits()
    ink = digits.images.mean(axis=(1, 2))
    strokes = ["thin" if i < np.quantile(ink, 0.35) else "bold" if i > np.quantile(ink, 0.65) else "plain" for i in ink]
    rng = random.Random(settings.seed)
    pictures = list(range(len(ink)))
    rng.shuffle(pictures)
    validation_documents = max(5, round(settings.documents * VALIDATION_SHARE))
    held_out = round(len(pictures) * VALIDATION_SHARE)

    partial = output / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "train").mkdir(parents=True)
    (partial / "val").mkdir()
    # forked from a process without threads, which fork would copy. One task a process: see Espeak.
    context = get_context("forkserver")
    context.set_forkserver_preload(["mom_tools.demo.corpus"])
    with context.Pool(workers, maxtasksperchild=1) as pool:
        wanted = round(settings.documents * (1 - DIGIT_SHARE - SUM_SHARE) * 1.1)
        sources = [list(_manuals())]
        # reading the packages takes seconds, and a small corpus does without
        if len(collect_chunks(sources, random.Random(0))) < wanted:
            sources += pool.map(_docstrings, DOCUMENTED_PACKAGES, chunksize=1)
        chunks = collect_chunks(sources, rng)
        # Chunks share no paragraph, so a split of the chunks is a split of the text.
        spare = max(1, round(len(chunks) * VALIDATION_SHARE))
        train = plan_documents(
            settings.documents - validation_documents,
            pictures[held_out:], digits.target, strokes, chunks[spare:], settings.seed,
        )  # fmt: skip
        validation = plan_documents(
            validation_documents, pictures[:held_out], digits.target, strokes, chunks[:spare], settings.seed + 1
        )
        # name -> documents
        shards = {f"train/train-{i:05d}.tar": train[i::TRAIN_SHARDS] for i in range(TRAIN_SHARDS)}
        shards["val/val-00000.tar"] = validation
        splits: dict[str, dict[str, float]] = {"train": {}, "val": {}}
        jobs = [(f"{i}-", documents, digits.images) for i, documents in enumerate(shards.values())]
        rendered = tqdm(pool.imap(render, jobs), desc="writing shards", total=len(jobs), unit="shard")
        for name, (samples, counts) in zip(shards, rendered, strict=True):
            with TarWriter(str(partial / name), mtime=0) as tar:
                for sample in samples:
                    tar.write(sample)
            total = splits[name.split("/")[0]]
            for what, value in counts.items():
                total[what] = round(total.get(what, 0) + value, 2)

    summary_file.unlink(missing_ok=True)
    for split in splits:
        shutil.rmtree(output / split, ignore_errors=True)
        os.replace(partial / split, output / split)
    partial.rmdir()
    summary = {"settings": asdict(settings), **splits}
    (output / ".summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(output / ".summary.json", summary_file)
    return summary


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for train/, val/ and summary.json")
    parser.add_argument("--documents", type=int, default=4800, help="number of documents (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="number of processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus (default: %(default)s)")
    arguments = parser.parse_args()
    with exit_clearly():
        if arguments.documents < 50 or arguments.workers < 1:
            raise UserError("--documents must be at least 50 and --workers at least 1")
        summary = build_corpus(arguments.output, Settings(arguments.documents, arguments.seed), arguments.workers)
        print(f"{'':8}{'documents':>11}{'characters':>12}{'images':>8}{'recordings':>12}{'seconds':>9}")
        for split in ("train", "val"):
            c = summary[split]
            print(
                f"{split:8}{c['documents']:>11,.0f}{c['characters']:>12,.0f}{c['images']:>8,.0f}"
                f"{c['recordings']:>12,.0f}{c['speech_seconds']:>9,.0f}"
            )


if __name__ == "__main__":
    main()
