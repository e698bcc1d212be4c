"""Score the pictures and speech that a run makes for held-out texts, beside the real pictures and recordings.

    mom score RUN --shards tokens/val --vision models/dinov2 --clip models/clip --samples 10000
    mom score RUN --shards tokens/val --raw raw/val --asr models/whisper --language english
    mom score RUN --shards tokens/val --raw raw/val --round-trip --dnsmos --pocketsphinx

Pictures: Fréchet distance of features (--vision), CLIP score (--clip), PSNR and SSIM to the originals (--round-trip).
Speech: word error rate (--asr, --pocketsphinx), quality (--dnsmos). Texts are those of held-out documents of one text
and one picture or recording. Samples are kept: the same command again goes on, and several processes share the work,
each with its own --part K/N. Models are folders on this machine; nothing is fetched.
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

from mom_tokenizers.errors import UserError, exit_clearly, write_text
from mom_tools.model import scores, signals
from mom_tools.model.pairs import FEWEST, chosen_pairs, originals
from mom_tools.model.scores import Score
from mom_tools.options import add_device, add_json, add_tokenizers, add_weights, command_parser
from mom_tools.output import write_json
from mom_train.validation.pairs import Pair

if TYPE_CHECKING:
    from mom_tokenizers.bundle import Tokenizers

LONGEST = 30.0  # seconds: what Whisper hears at once
SCORES = "scores.json"
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
    vision: scores.Vision | None, clip: scores.Vision | None, round_trip: bool = False,
) -> tuple[list[Score], list[str]]:  # fmt: skip
    """The scores of pictures, and notes for the reader of the table."""
    import torch
    from PIL import Image
    from tqdm import tqdm

    from mom_tokenizers.image.autoencoder import fitted, picture
    from mom_tokenizers.media.pictures import decode_image

    tokenizer: Any = tokenizers.tokenizer("image")

    def drawn(i: int) -> Image.Image:
        with Image.open(folder / f"{pairs[i].name}.png") as image:
            return image.convert("RGB")

    def decoded(i: int) -> Image.Image:
        return tokenizer.decode(pairs[i].segment(0).shaped)

    def original(i: int) -> Image.Image:
        return picture(torch.from_numpy(fitted(decode_image(raw[i]), *tokenizer.pixels_of(pairs[i].grid))))

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
    if round_trip:
        more, said = nearness(kept, drawn, decoded, original, vision)
        found, notes = found + more, notes + said
    return found, notes


def nearness(
    kept: Sequence[int], drawn: Callable[[int], Any], decoded: Callable[[int], Any], original: Callable[[int], Any],
    vision: scores.Vision | None,
) -> tuple[list[Score], list[str]]:  # fmt: skip
    """How near pictures are to their originals, number by number, beside what comes without any model."""
    from PIL import Image, ImageOps
    from tqdm import tqdm

    near = {"PSNR, dB": signals.psnr, "SSIM": signals.ssim}
    values: dict[tuple[str, str], list[float]] = {}
    small = 0  # pictures that SSIM cannot be computed of
    for place, i in enumerate(tqdm(kept, desc="compare with originals", unit="picture", disable=None)):
        real = original(i)
        truth = signals.pixels(real)
        of_another = drawn(kept[place - 1])
        if of_another.size != real.size:  # a picture of another shape
            of_another = ImageOps.fit(of_another, real.size)
        others = {
            "decoded": decoded(i),
            "samples": drawn(i),
            "samples of other texts: floor": of_another,
            "mean colour": Image.new("RGB", real.size, tuple(truth.mean(axis=(0, 1)).round().astype(int).tolist())),
            "noise": Image.fromarray(signals.noise_like(truth, i)),
        }
        fits = min(truth.shape[:2]) >= signals.WINDOW
        small += not fits
        seen = vision.layers(real) if vision is not None else None
        for name, picture in others.items():
            for figure, measure in near.items():
                if fits or figure != "SSIM":
                    value = min(measure(signals.pixels(picture), truth), 100.0)
                    values.setdefault((figure, name), []).append(value)
            if vision is not None and seen is not None:
                figure = f"perceptual distance, layers of {vision.folder.resolve().name}"
                distance = scores.perceptual_distance(vision.layers(picture), seen)
                values.setdefault((figure, name), []).append(distance)
    found = [
        Score(figure, f"{name}, originals", float(np.mean(of)), scores.interval(np.array(of)), len(of))
        for (figure, name), of in sorted(values.items(), key=lambda item: item[0][0])
    ]
    notes = [
        "PSNR, SSIM: higher is nearer; at most 100 dB and 1. What a sample is to be like its text does not say in all, "
        "so compare it with samples of other texts."
    ]
    if small:
        notes.append(
            f"SSIM: {small} of {len(kept)} pictures are left out, because they are smaller than its window of "
            f"{signals.WINDOW} pixels."
        )
    return found, notes


def listen(
    folder: Path, pairs: Sequence[Pair], texts: Sequence[str], raw: Sequence[Any], tokenizers: Tokenizers,
    hear: scores.Recogniser | None, sphinx: signals.Pocketsphinx | None = None, dnsmos: signals.Dnsmos | None = None,
) -> tuple[list[Score], list[str]]:  # fmt: skip
    """The scores of speech, and notes for the reader of the table."""
    import soundfile
    from tqdm import tqdm

    from mom_tokenizers.media.recordings import decode_audio

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

    def noise(i: int) -> Any:
        waveform, rate = decoded(i)
        return signals.noise_like(waveform, i), rate

    found, notes = [], []
    recognisers: dict[str, Callable[[np.ndarray, int], str]] = {}
    if hear is not None:
        recognisers["word error rate, %"] = hear
    if sphinx is not None:
        recognisers["word error rate by pocketsphinx, %"] = sphinx
        notes.append(signals.UNDERSTANDS)
    for figure, listener in recognisers.items():
        for name, (make, which) in (
            sets if listener is hear else {**sets, "noise": (noise, sets["samples"][1])}
        ).items():
            heard = [listener(*make(i)) for i in tqdm(which, desc=f"listen to {name}", unit="recording", disable=None)]
            errors_N, words_N = scores.word_errors([texts[i] for i in which], heard).T
            value = 100 * float(errors_N.sum() / words_N.sum())
            found.append(Score(figure, name, value, scores.interval(100 * errors_N, words_N), len(heard)))
    if recognisers:
        notes.insert(0, f"Word error rate: in {scores.NORMALISED}, by jiwer.")
    if dnsmos is not None:
        for name, (make, which) in {**sets, "noise": (noise, sets["samples"][1])}.items():
            rated = [dnsmos(*make(i)) for i in tqdm(which, desc=f"rate {name}", unit="recording", disable=None)]
            for part in signals.DNSMOS_POLYNOMIALS:
                values_N = np.array([one[part] for one in rated])
                value = float(values_N.mean())
                found.append(Score(f"DNSMOS {part}", name, value, scores.interval(values_N), len(values_N)))
        notes.append(
            "DNSMOS: a model's guess how people would rate the sound, from 1 to 5; noise is as loud as decoded."
        )
    return found, notes


def score(arguments: argparse.Namespace, part: tuple[int, int] | None) -> dict[str, Any]:
    from mom_data.shards.dataset import TokenDataset, check_agreement
    from mom_data.shards.format import TokenSegment, sha256_of
    from mom_tokenizers.bundle import Tokenizers
    from mom_train.checkpoint.load import load_run
    from mom_train.checkpoint.store import Checkpoints
    from mom_train.generate.sampler import sample_document
    from mom_train.generate.samples import settings

    given = {role: path for role in ("vision", "clip", "asr") if (path := getattr(arguments, role)) is not None}
    looks = "vision" in given or "clip" in given or arguments.round_trip
    listens = "asr" in given or arguments.pocketsphinx or arguments.dnsmos is not None
    if not looks and not listens:
        raise UserError(
            "give a model: --vision or --clip to look at pictures, --asr to listen to speech; or ask for what needs no "
            "model from elsewhere: --round-trip, --pocketsphinx, --dnsmos"
        )
    if arguments.round_trip and not arguments.raw:
        raise UserError("--round-trip compares with the originals: give --raw")
    scores.needed("jiwer", "scores")
    sphinx = signals.Pocketsphinx() if arguments.pocketsphinx else None
    file = arguments.dnsmos
    dnsmos = None if file is None else signals.Dnsmos(Path(file) if file else None)
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
    check_agreement([dataset], dict(vocab.sizes), described, vocab.shapes)
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
    for modality in ["image"] * looks + ["speech"] * listens:
        if modality not in vocab.modalities:
            raise UserError(f"this run has no modality '{modality}', only {', '.join(vocab.modalities)}")
        number = vocab.modalities.index(modality)

        def draw(pair: Pair, modality: str = modality, number: int = number) -> Any:
            seed = hashlib.blake2b(f"{arguments.seed} {modality} {pair.name}".encode(), digest_size=6).digest()
            # A picture is drawn in the shape of the real one.
            document = [TokenSegment(0, pair.text), TokenSegment(number, np.zeros(0, np.uint32), pair.grid)]
            # its first span alone: what would follow is not asked for
            return next(sample_document(model, vocab, document, sampling, int.from_bytes(seed, "little")))[1]

        pairs = chosen_pairs(dataset, modality, arguments.samples, units, tokenizers.tokenizer("text"))
        # ValueError now where it has no picture, or no sound
        tokenizers.tokenizer(modality).decode(pairs[0].segment(0).shaped)
        raw = originals(dataset, pairs, tokenizers, arguments.raw) if arguments.raw and part is None else []
        sample(root / modality, identity, pairs[part[0] :: part[1]] if part else pairs, modality, draw, tokenizers)
        if part is not None:
            continue
        texts = [tokenizers.tokenizer("text").decode(pair.text) for pair in pairs]
        rest = (root / modality, pairs, texts, raw, tokenizers)
        if modality == "image":
            more, said = look(*rest, vision, clip, arguments.round_trip)
        else:
            more, said = listen(*rest, hear, sphinx, dnsmos)
        found, notes = found + more, notes + said
    figures = {
        "checkpoint": str(checkpoint), **{k: identity[k] for k in ("step", "weights", "seed", "sampling")},
        "shards": dataset.location, "samples": str(root),
        "models": {
            role: {"folder": str(path), "sha256": {file.name: sha256_of(file) for file in scores.files_of(path)}}
            for role, path in given.items()
        },
        "scores": [asdict(one) for one in found], "notes": notes,
    }  # fmt: skip
    if part is None:  # for the run's report
        write_text(root / SCORES, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return figures


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
    parser.add_argument(
        "--round-trip", action="store_true", help="PSNR and SSIM of pictures to their originals (--raw)"
    )
    parser.add_argument(
        "--dnsmos",
        nargs="?",
        const="",
        metavar="FILE",
        help="speech quality by DNSMOS, of the package speechmos or a file",
    )
    parser.add_argument(
        "--pocketsphinx", action="store_true", help="word errors by the small English recogniser of pocketsphinx"
    )
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
