"""Score the pictures and speech that a run makes for held-out texts, beside the real pictures and recordings.

    mom score RUN --shards tokens/val --vision models/dinov2 --clip models/clip --samples 10000
    mom score RUN --shards tokens/val --raw raw/val --asr models/whisper --language english

Pictures: Fréchet distance of features (--vision), CLIP score (--clip). Speech: word error rate (--asr). Texts are those
of held-out documents of one text and one picture or recording. Samples are kept: the same command again goes on, and
several processes share the work, each with its own --part K/N. Models are folders on this machine; nothing is fetched.
Needs pip install '.[tokenizers,scores]'. What the figures mean: docs/explanation/judging.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.model import scores
from mom_tools.model.pairs import FEWEST, chosen_pairs, originals
from mom_tools.model.scores import Score
from mom_tools.options import add_device, add_json, add_tokenizers, add_weights, command_parser
from mom_tools.output import write_json
from mom_train.validation.pairs import Pair

if TYPE_CHECKING:
    from mom_tokenizers.bundle import Tokenizers

LONGEST = 30.0  # seconds: what Whisper hears at once
ENDING = {"image": "png", "speech": "wav"}

Set = tuple[Callable[[int], Any], Sequence[int]]
"""A function that returns the picture or recording of pair number i, and the numbers of the pairs that have one."""


def sample(
    folder: Path, identity: Mapping[str, Any], pairs: Sequence[Pair], modality: str, draw: Callable[[Pair], Any],
    tokenizers: Tokenizers,
) -> None:  # fmt: skip
    """Make those samples FOLDER/NAME.png or .wav that do not exist yet. Raises ValueError where the samples in the
    folder were made with other settings, or where one cannot be decoded."""
    from tqdm import tqdm

    from mom_train.generate.samples import write_span

    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "settings.json"
    mine = json.loads(json.dumps(identity))
    there = json.loads(settings.read_text()) if settings.exists() else mine
    if differing := sorted(key for key in there.keys() | mine.keys() if there.get(key) != mine.get(key)):
        raise UserError(f"{folder} holds samples made with another {', '.join(differing)}: give another --out")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as name:
        making = Path(name)
        (making / settings.name).write_text(json.dumps(mine, indent=1) + "\n")
        (making / settings.name).replace(settings)
        for pair in tqdm(pairs, desc=f"{modality} samples", unit="sample", disable=None):
            final = folder / f"{pair.name}.{ENDING[modality]}"
            if final.exists():
                continue
            span = write_span(making, pair.name, modality, draw(pair), tokenizers)
            if span.decoded is None:
                raise UserError(f"{modality}: a sample cannot be decoded: {span.markdown}")
            for file in sorted(making.iterdir(), key=lambda file: file.suffix == final.suffix):
                file.replace(folder / file.name)  # what is looked for goes last


def look(
    folder: Path, pairs: Sequence[Pair], texts: Sequence[str], raw: Sequence[Any], tokenizers: Tokenizers,
    vision: scores.Vision | None, clip: scores.Vision | None,
) -> tuple[list[Score], list[str]]:  # fmt: skip
    """The scores of pictures, and notes for the reader of the table."""
    import torch
    from PIL import Image
    from tqdm import tqdm

    from mom_tokenizers.image.autoencoder import picture, preprocess
    from mom_tokenizers.media.pictures import decode_image

    tokenizer: Any = tokenizers.tokenizer("image")

    def drawn(i: int) -> Image.Image:
        with Image.open(folder / f"{pairs[i].name}.png") as image:
            return image.convert("RGB")

    def decoded(i: int) -> Image.Image:
        return tokenizer.decode(pairs[i].values)

    def original(i: int) -> Image.Image:
        return picture(torch.from_numpy(preprocess(decode_image(raw[i]), tokenizer.resolution)))

    sets: dict[str, Set] = {
        "samples": (drawn, range(len(pairs))),
        "decoded": (decoded, range(len(pairs))),
    }
    if kept := [i for i, data in enumerate(raw) if data is not None]:
        sets["originals"] = original, kept
    features: dict[int, dict[str, np.ndarray]] = {}
    for model in (vision, clip):
        if model is not None and id(model) not in features:
            features[id(model)] = {
                name: model.pictures(make(i) for i in tqdm(which, desc=f"look at {name}", unit="picture", disable=None))
                for name, (make, which) in sets.items()
            }
    found, notes = [], []
    if vision is not None:
        of, figure = features[id(vision)], f"Fréchet distance, features of {vision.folder.resolve().name}"
        pairings = {
            "samples, decoded": (of["samples"], of["decoded"]),
            "decoded: one half, the other": (of["decoded"][::2], of["decoded"][1::2]),
        }
        if kept:
            pairings["samples, originals"] = of["samples"][kept], of["originals"]
            pairings["decoded, originals: tokenizer's ceiling"] = of["decoded"][kept], of["originals"]
        for name, (x_ND, y_ND) in pairings.items():
            found.append(Score(figure, name, scores.frechet_distance(x_ND, y_ND), None, len(x_ND)))
        N, D = of["samples"].shape
        notes.append(
            f"Fréchet distance: of the {vision.feature}, {D} wide; it is FID only where features are Inception's. The "
            "fewer the samples, the larger it comes out: compare at equal n. The two halves show what n alone does."
        )
        if N <= D:
            notes.append(f"Warning: {N} samples of {D} dimensions: a singular covariance. Take several times as many.")
    if clip is not None:
        of = features[id(clip)]
        text_ND, cut = clip.texts(texts)
        values = {name: scores.clip_scores(of[name], text_ND[list(which)]) for name, (_, which) in sets.items()}
        some = np.random.default_rng(0).permutation(len(pairs))
        others_ND = text_ND[np.roll(some, 1)]
        values["decoded, texts shuffled: floor"] = scores.clip_scores(of["decoded"][some], others_ND)
        for name, values_N in values.items():
            found.append(Score("CLIP score", name, float(values_N.mean()), scores.interval(values_N), len(values_N)))
        if cut:
            notes.append(f"CLIP score: {cut} texts are longer than the model reads, and were cut.")
    return found, notes


def listen(
    folder: Path, pairs: Sequence[Pair], texts: Sequence[str], raw: Sequence[Any], tokenizers: Tokenizers,
    hear: scores.Recogniser | None,
) -> tuple[list[Score], list[str]]:  # fmt: skip
    """The scores of speech, and notes for the reader of the table."""
    import soundfile
    from tqdm import tqdm

    from mom_tokenizers.media.recordings import decode_audio

    assert hear is not None
    tokenizer = tokenizers.tokenizer("speech")

    def spoken(i: int) -> Any:
        return soundfile.read(folder / f"{pairs[i].name}.wav", dtype="float32")

    def decoded(i: int) -> Any:
        return tokenizer.decode(pairs[i].values)

    def original(i: int) -> Any:
        return decode_audio(raw[i])

    sets: dict[str, Set] = {
        "samples": (spoken, range(len(pairs))),
        "decoded": (decoded, range(len(pairs))),
    }
    if kept := [i for i, data in enumerate(raw) if data is not None]:
        sets["originals"] = original, kept
    found = []
    for name, (make, which) in sets.items():
        heard = [hear(*make(i)) for i in tqdm(which, desc=f"listen to {name}", unit="recording", disable=None)]
        errors_N, words_N = scores.word_errors([texts[i] for i in which], heard).T
        value = 100 * float(errors_N.sum() / words_N.sum())
        found.append(Score("word error rate, %", name, value, scores.interval(100 * errors_N, words_N), len(heard)))
    return found, [f"Word error rate: in {scores.NORMALISED}, by jiwer."]


def score(arguments: argparse.Namespace, part: tuple[int, int] | None) -> dict[str, Any]:
    from mom_data.shards.dataset import TokenDataset, check_agreement
    from mom_data.shards.format import TokenSegment, sha256_of
    from mom_tokenizers.bundle import Tokenizers
    from mom_train.checkpoint.load import load_run
    from mom_train.checkpoint.store import Checkpoints
    from mom_train.generate.sampler import sample_document
    from mom_train.generate.samples import settings

    given = {role: path for role in ("vision", "clip", "asr") if (path := getattr(arguments, role)) is not None}
    if not given:
        raise UserError("give a model: --vision or --clip to look at pictures, --asr to listen to speech")
    scores.needed("jiwer", "scores")
    seeing = {path: scores.Vision(path, arguments.device, arguments.batch) for r, path in given.items() if r != "asr"}
    vision, clip = seeing.get(arguments.vision), seeing.get(arguments.clip)
    if clip is not None:
        clip.texts(["a picture"])  # ValueError now, not after hours, where it reads none
    hear = scores.Recogniser(arguments.asr, arguments.device, arguments.language) if "asr" in given else None
    checkpoint = Checkpoints.of(arguments.run).find(arguments.step)
    model, config = load_run(arguments.run, checkpoint.step, arguments.device, "ema" if arguments.ema else "model")
    path, vocab = arguments.tokenizers or config.tokenizers, config.layout
    if path is None:
        raise UserError(f"{arguments.run} names no tokenizers; give --tokenizers TOKENIZERS.yaml")
    tokenizers, dataset = Tokenizers.load(path, arguments.device), TokenDataset(arguments.shards)
    described = tokenizers.describe()
    check_agreement([dataset], dict(vocab.sizes), described)
    options = ("temperature", "top_p", "denoising_steps", "guidance")
    chosen = {name: value for name in options if (value := getattr(arguments, name)) is not None}
    config.check_guidance(chosen.get("guidance", 1.0))
    units = int(arguments.seconds * float(described.get("speech", {}).get("units_per_second", 25)))
    sampling = settings(tokenizers, arguments.patches, max_units=units, **chosen)
    identity = {
        "checkpoint": hashlib.sha256(repr(sorted(checkpoint.sums().items())).encode()).hexdigest(),
        "step": checkpoint.step,
        "weights": "ema" if arguments.ema else "model",
        "seed": arguments.seed,
        # as it was written before there were several codebooks
        "sampling": {k: v for k, v in asdict(sampling).items() if (k, v) != ("codebooks", None)},
        "shards": dataset.fingerprint,
        "tokenizers": {m: d["fingerprint"] for m, d in described.items()},
    }
    root = arguments.out or Path(arguments.run) / "scores" / f"step-{checkpoint.step}{'-ema' * arguments.ema}"
    found: list[Score] = []
    notes: list[str] = []
    for modality in ["image"] * bool(seeing) + ["speech"] * (hear is not None):
        if modality not in vocab.modalities:
            raise UserError(f"this run has no modality '{modality}', only {', '.join(vocab.modalities)}")
        opened = TokenSegment(vocab.modalities.index(modality), np.zeros(0, np.uint32))

        def draw(pair: Pair, modality: str = modality, opened: TokenSegment = opened) -> Any:
            seed = hashlib.blake2b(f"{arguments.seed} {modality} {pair.name}".encode(), digest_size=6).digest()
            document = [TokenSegment(0, pair.text), opened]
            # its first span alone: what would follow is not asked for
            return next(sample_document(model, vocab, document, sampling, int.from_bytes(seed, "little")))[1]

        pairs = chosen_pairs(dataset, modality, arguments.samples, units, tokenizers.tokenizer("text"))
        tokenizers.tokenizer(modality).decode(pairs[0].values)  # ValueError now where it has no picture, or no sound
        raw = originals(dataset, pairs, tokenizers, arguments.raw) if arguments.raw and part is None else []
        sample(root / modality, identity, pairs[part[0] :: part[1]] if part else pairs, modality, draw, tokenizers)
        if part is not None:
            continue
        texts = [tokenizers.tokenizer("text").decode(pair.text) for pair in pairs]
        rest = (root / modality, pairs, texts, raw, tokenizers)
        more, said = look(*rest, vision, clip) if modality == "image" else listen(*rest, hear)
        found, notes = found + more, notes + said
    return {
        "checkpoint": str(checkpoint), **{k: identity[k] for k in ("step", "weights", "seed", "sampling")},
        "shards": dataset.location, "samples": str(root),
        "models": {
            role: {"folder": str(path), "sha256": {file.name: sha256_of(file) for file in scores.files_of(path)}}
            for role, path in given.items()
        },
        "scores": [asdict(one) for one in found], "notes": notes,
    }  # fmt: skip


def parsed(part: str | None) -> tuple[int, int] | None:
    if part is None:
        return None
    numbers = part.split("/")
    if len(numbers) != 2 or not all(n.isdigit() for n in numbers) or not int(numbers[0]) < int(numbers[1]):
        raise UserError(f"--part {part}: K/N, with K from 0 to N - 1")
    return int(numbers[0]), int(numbers[1])


def as_text(figures: Mapping[str, Any]) -> str:
    from tabulate import tabulate

    rows = []
    for one in figures["scores"]:
        interval = "" if one["interval"] is None else "{:.2f} to {:.2f}".format(*one["interval"])
        rows.append([one["figure"], one["of"], f"{one['value']:.4g}", interval, f"{one['n']:,}"])
    title = f"{figures['checkpoint']}, {figures['weights']} weights, texts of {figures['shards']}"
    lines = tabulate(rows, ["figure", "of", "value", "95 % interval", "n"], tablefmt="pipe", disable_numparse=True)
    return "\n\n".join([title, lines, *figures["notes"]])


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("run", help="run directory")
    parser.add_argument("--shards", required=True, metavar="PATH", help="folder or URL of held-out token shards")
    parser.add_argument("--raw", nargs="+", metavar="PATH", help="raw documents of the shards, to compare originals")
    parser.add_argument("--vision", type=Path, metavar="FOLDER", help="vision model whose features are compared")
    parser.add_argument("--clip", type=Path, metavar="FOLDER", help="CLIP model, which compares pictures with texts")
    parser.add_argument("--asr", type=Path, metavar="FOLDER", help="speech recogniser, Whisper or one with a CTC head")
    parser.add_argument("--language", help="language that a multilingual Whisper expects (default: it guesses)")
    parser.add_argument(
        "--samples", type=int, default=1000, help="most samples of each modality (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=LONGEST, help="longest recording (default: %(default)s)")
    parser.add_argument("--part", metavar="K/N", help="only make every N-th sample from the K-th on, and no scores")
    add_weights(parser)
    add_tokenizers(parser)
    parser.add_argument("--out", type=Path, help="folder of the samples (default: RUN/scores/step-N)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, help="this option and the next four mean what they mean in `mom generate`"
    )
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--patches", type=int, help="codes or patches of a picture")
    parser.add_argument("--denoising-steps", type=int)
    parser.add_argument("--guidance", type=float)
    add_device(parser)
    parser.add_argument(
        "--batch", type=int, default=32, help="pictures that the vision model takes at once (default: %(default)s)"
    )
    add_json(parser)
    arguments = parser.parse_args()
    with exit_clearly():
        if arguments.samples < FEWEST or arguments.batch < 1:
            raise UserError(f"--samples: at least {FEWEST}; --batch: at least 1")
        from mom_tokenizers.base import resolved_device

        arguments.device = resolved_device(arguments.device or "auto")
        if not 0 < arguments.seconds <= LONGEST:
            raise UserError(f"--seconds: above 0 and at most {LONGEST:g}")
        part = parsed(arguments.part)
        figures = score(arguments, part)
        if part is not None:
            print(f"part {arguments.part} is done: {figures['samples']}", file=sys.stderr)
        elif write_json(arguments.json, figures):
            print(as_text(figures))


if __name__ == "__main__":
    main()
