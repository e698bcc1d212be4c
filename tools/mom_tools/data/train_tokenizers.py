"""Train small tokenizers from raw documents: byte-level BPE, codes or latents of pictures, k-means speech units.

    mom train-tokenizers --config configs/demo_tokenizers.yaml --input 'raw/train-*.tar' --output DIR
    mom train-tokenizers --config configs/demo_tokenizers.yaml --input 'raw/train-*.tar' --output DIR --vocoder 500

DIR gets text/, image/, speech/, tokenizers.yaml (what tokenize_shards.py takes), training.json (figures) and
reconstructions.png (held-out pictures above what their codes or latents bring back). A stage whose result is there
already, from the same config, inputs and seed, is not repeated. `--vocoder` also trains a vocoder of the speech units,
in so many steps (500 take about 2 minutes of one core); it can be added later and changes no unit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError
from tqdm import tqdm

from mom_data.documents.document import BadSample, Document, read_documents
from mom_data.documents.inputs import files_of_side
from mom_tokenizers.base import resolved_device
from mom_tokenizers.errors import UserError, exit_clearly
from mom_tokenizers.files import read_yaml, write_whole
from mom_tokenizers.image.autoencoder import preprocess
from mom_tokenizers.image.measures import usage
from mom_tokenizers.image.patch_training import Strict
from mom_tokenizers.image.pretrained import take_pretrained
from mom_tokenizers.image.training import ImageConfig, PretrainedConfig, train_image
from mom_tokenizers.media.pictures import decode_image
from mom_tokenizers.media.recordings import Waveform, decode_audio
from mom_tokenizers.speech.codecs import CODECS
from mom_tokenizers.speech.units import SpeechTokenizer, read_centroids
from mom_tokenizers.speech.vocoders import FOLDER as VOCODER
from mom_tokenizers.text import TextTokenizer
from mom_tools.options import add_input, command_parser

STAGES = ("text", "image", "speech")


class TextConfig(Strict):
    size: int = Field(ge=256)
    max_documents: PositiveInt = 20_000


class SpeechConfig(Strict):
    size: int = Field(ge=2)
    extractor: Literal[
        "log_mel", "hubert", "wav2vec2", "wavlm", "data2vec-audio", "mimi", "neucodec", "xcodec2", "dac"
    ] = "log_mel"
    model: str | None = None  # all but log_mel: a folder with config.json and weights
    layer: int | None = None
    codebooks: PositiveInt = 1  # how many of a codec's codebooks; several make ids in the delay pattern
    vocoder: str | None = None  # folder of a vocoder for centroids; codecs have their own decoder
    centroids: str | None = None  # .safetensors or .npy of published ones, in place of k-means on the corpus
    max_seconds: PositiveFloat = 20_000


class Config(Strict):
    text: TextConfig
    image: ImageConfig | None = None
    speech: SpeechConfig | None = None

    @property
    def kinds(self) -> dict[str, str]:
        """Modality -> kind of its tokenizer, for those that are configured."""
        kinds = {"text": TextTokenizer.kind, "speech": SpeechTokenizer.kind}
        if self.image:
            kinds["image"] = self.image.kind
        return {name: kinds[name] for name in STAGES if getattr(self, name) is not None}


def load_config(path: Path) -> Config:
    """Read a config of tokenizers. Raises UserError that names every wrong key."""
    try:
        return Config.model_validate(read_yaml(path))
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(file)'}: {e['msg']}" for e in error.errors()]
        raise UserError(f"{path}:\n" + "\n".join(lines)) from None


@dataclass
class Sample:
    """The documents that were drawn from the corpus to train tokenizers on."""

    texts: list[str] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)  # uint8 (3, resolution, resolution)
    waveforms: list[Waveform] = field(default_factory=list)
    unreadable: int = 0


def draw_sample(files: list[Path], config: Config, modalities: set[str], seed: int) -> Sample:
    """Draw documents up to the configured limits, spread evenly over the files: each file gives its share of what is
    still wanted."""
    sample = Sample()
    caps = {"text": float(config.text.max_documents)}
    caps |= {"image": float(config.image.max_images)} if config.image else {}
    caps |= {"speech": config.speech.max_seconds} if config.speech else {}
    caps = {modality: cap for modality, cap in caps.items() if modality in modalities}
    taken = dict.fromkeys(caps, 0.0)
    seen: set[bytes] = set()  # the same picture twice would put held-out ones among those trained on
    order = list(files)
    random.Random(seed).shuffle(order)
    for number, path in enumerate(tqdm(order, desc="reading", unit="file")):
        quota = {m: taken[m] + (cap - taken[m]) / (len(order) - number) for m, cap in caps.items()}
        for document in _until(read_documents(path), lambda q=quota: all(taken[m] >= q[m] for m in q)):  # type: ignore[misc]
            if isinstance(document, BadSample):
                sample.unreadable += 1
                continue
            texts = [s.data for s in document.segments if isinstance(s.data, str)]
            if texts and "text" in caps and taken["text"] < quota["text"]:
                sample.texts += texts
                taken["text"] += 1
            for segment in document.segments:
                wanted = segment.modality in caps and taken[segment.modality] < quota[segment.modality]
                if not wanted or isinstance(segment.data, str):
                    continue
                digest = hashlib.blake2b(segment.data, digest_size=16).digest()
                if digest in seen:
                    continue
                seen.add(digest)
                try:
                    if segment.modality == "image" and config.image:
                        pixels = preprocess(decode_image(segment.data), config.image.resolution)
                        sample.images.append(((pixels + 1) * 127.5).round().astype(np.uint8))
                        taken["image"] += 1
                    elif segment.modality == "speech":
                        waveform, rate = decode_audio(segment.data)
                        if len(waveform) < 0.02 * rate:
                            raise UserError("shorter than a unit")
                        sample.waveforms.append((waveform, rate))
                        taken["speech"] += len(waveform) / rate
                except ValueError:
                    sample.unreadable += 1
    for modality, amount in taken.items():
        if not amount:
            raise UserError(
                f"the inputs hold no {modality} that can be read; take '{modality}' out of the config, or add inputs"
            )
    return sample


def _until(documents: Iterator[Document | BadSample], full: Callable[[], bool]) -> Iterator[Document | BadSample]:
    for document in documents:
        yield document
        if full():
            return


# ------------------------------------------------------------------------------------------------ stages


def train_text(config: TextConfig, sample: Sample, directory: Path) -> dict[str, Any]:
    tokenizer = TextTokenizer.train(tqdm(sample.texts, desc="text", unit="text"), config.size)
    tokenizer.save(directory)
    some = sample.texts[:500]
    tokens = sum(map(len, tokenizer.encode_batch(some)))
    return {
        "texts": len(sample.texts),
        "characters": sum(map(len, sample.texts)),
        "size": tokenizer.size,
        "characters_per_token": round(sum(map(len, some)) / max(1, tokens), 3),
    }


def train_speech(config: SpeechConfig, sample: Sample, directory: Path, seed: int, device: str) -> dict[str, Any]:
    if config.centroids is not None or config.extractor in CODECS:  # nothing is left to be trained
        given = None if config.centroids is None else read_centroids(Path(config.centroids))
        tokenizer = SpeechTokenizer(
            given,
            config.extractor,
            model=config.model,
            layer=config.layer,
            codebooks=config.codebooks,
            vocoder=config.vocoder,
        )
        if tokenizer.size != config.size:
            raise UserError(f"speech.size is {config.size}, but the units given are {tokenizer.size}")
    else:
        tokenizer = SpeechTokenizer.train(
            tqdm(sample.waveforms, desc="speech", unit="clip"),
            config.size,
            extractor=config.extractor,
            model=config.model,
            layer=config.layer,
            seed=seed,
            device=device,
            vocoder=config.vocoder,
        )
    tokenizer.save(directory)
    units = np.concatenate(tokenizer.encode_batch(sample.waveforms[:200]))
    return {
        "clips": len(sample.waveforms),
        "seconds_of_speech": round(sum(len(w) / rate for w, rate in sample.waveforms), 1),
        "size": tokenizer.size,
        **usage(units, tokenizer.size),
    }


# --------------------------------------------------------------------------------------------- the whole


def train_tokenizers(
    config: Config, files: list[Path], output: Path, seed: int, device: str = "cpu", vocoder: int | None = None
) -> dict[str, Any]:
    """Train the tokenizers that are missing under `output`, and in `vocoder` steps a vocoder of the speech units.
    Returns the figures of all stages."""
    check_vocoder(config, vocoder)
    inputs = [[f.name, f.stat().st_size] for f in files]
    stages = {name: getattr(config, name) for name in config.kinds}
    recipes = {n: {"config": recorded(c), "inputs": inputs, "seed": seed} for n, c in stages.items()}
    figures = {name: _finished(output / name, recipe) for name, recipe in recipes.items()}
    missing = {name for name, found in figures.items() if found is None}
    spoken = {"steps": vocoder, "inputs": inputs, "seed": seed, "speech": recipes.get("speech")}
    voiced = None if "speech" in missing else _finished(output / "speech" / VOCODER, spoken)
    speaks = vocoder is not None and voiced is None
    if missing or speaks:
        output.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        sample = draw_sample(files, config, missing | ({"speech"} if speaks else set()), seed)
        reading = time.monotonic() - started
    for name in stages:
        if name not in missing:
            continue
        partial = output / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        started = time.monotonic()
        if name == "text":
            found = train_text(config.text, sample, partial)
        elif name == "image":
            assert config.image
            if isinstance(config.image, PretrainedConfig):
                found = take_pretrained(config.image, sample.images, partial, device)
            else:
                found = train_image(config.image, sample.images, partial, seed, device)
        else:
            assert config.speech
            found = train_speech(config.speech, sample, partial, seed, device)
        found = {
            "seconds": round(time.monotonic() - started, 1),
            "seconds_reading": round(reading, 1),
            "unreadable": sample.unreadable,
            **found,
        }
        (partial / "training.json").write_text(json.dumps({"recipe": recipes[name], "figures": found}))
        shutil.rmtree(output / name, ignore_errors=True)
        os.replace(partial, output / name)
        figures[name] = found
    if speaks:
        assert vocoder is not None
        voiced = _train_vocoder(sample, vocoder, output, spoken, seed, device)
    if voiced is not None:
        figures["speech"] = {**(figures["speech"] or {}), **voiced}

    declared = declarations(config, output / "tokenizers.yaml")
    write_whole(output / "tokenizers.yaml", yaml.safe_dump(declared, sort_keys=False).encode())
    write_whole(output / "training.json", (json.dumps(figures, indent=1) + "\n").encode())
    if "image" in stages:
        write_whole(output / "reconstructions.png", (output / "image" / "reconstructions.png").read_bytes())
    return figures


def declarations(config: Config, file: Path) -> dict[str, Any]:
    """What tokenizers.yaml declares. What a user has added to the one that is there stays: the shapes of pictures, and
    modalities that are not made here."""
    declared: dict[str, Any] = {name: {"kind": kind, "path": name} for name, kind in config.kinds.items()}
    before = read_yaml(file) if file.is_file() else {}
    for name, entry in (before if isinstance(before, dict) else {}).items():
        same = name in declared and isinstance(entry, dict) and declared[name].items() <= entry.items()
        if same or name not in STAGES:
            declared[name] = entry
    return declared


def check_vocoder(config: Config, steps: int | None) -> None:
    """Raises UserError where no vocoder can be trained for the speech that is configured."""
    if steps is None:
        return
    if steps < 1:
        raise UserError(f"--vocoder {steps}: steps of training, at least 1")
    if config.speech is None:
        raise UserError("--vocoder: the config has no speech")
    if config.speech.extractor in CODECS:
        raise UserError(f"--vocoder: extractor '{config.speech.extractor}' decodes its own codes without one")
    if config.speech.vocoder is not None:
        raise UserError(f"--vocoder: the config names a vocoder already, {config.speech.vocoder}; take one of both out")


def _train_vocoder(
    sample: Sample, steps: int, output: Path, recipe: dict[str, Any], seed: int, device: str
) -> dict[str, Any]:
    from mom_tokenizers.speech.vocoder_training import train_vocoder

    partial = output / ".vocoder.partial"
    shutil.rmtree(partial, ignore_errors=True)
    found = train_vocoder(SpeechTokenizer.load(output / "speech"), sample.waveforms, steps, partial, seed, device)
    (partial / "training.json").write_text(json.dumps({"recipe": recipe, "figures": found}))
    shutil.rmtree(output / "speech" / VOCODER, ignore_errors=True)
    os.replace(partial, output / "speech" / VOCODER)
    return found


def recorded(config: Strict) -> dict[str, Any]:
    """A stage's config as its recipe has it. Keys that were added later are left out at their defaults, so that what
    was trained before them is not trained again."""
    values = config.model_dump(mode="json")
    return {k: v for k, v in values.items() if (k, v) not in (("codebooks", 1), ("vocoder", None))}


def warnings_of(config: Config, figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Warnings about tokenizers that are worse than the config asks for, and what to change."""
    warnings = []
    text, image, speech = (figures.get(name, {}) for name in STAGES)
    if text and text["size"] < config.text.size:
        warnings.append(
            f"text: the tokenizer has {text['size']} ids, fewer than the {config.text.size} asked for: {text['texts']} "
            f"texts of {text['characters']:,} characters hold no more pairs. Give more texts (text.max_documents is "
            f"{config.text.max_documents}), or set text.size to {text['size']} or less. A vocabulary.text above "
            "it costs parameters that are never used."
        )
    if image and isinstance(config.image, PretrainedConfig):
        if image["psnr"] <= image["psnr_of_mean_colour"]:
            warnings.append(
                f"image: pictures come back from {config.image.folder} worse ({image['psnr']} dB) than painted all "
                f"over in their mean colour ({image['psnr_of_mean_colour']} dB). Look at "
                "reconstructions.png: these are not its weights, or it is not meant for such pictures."
            )
        if not 0.5 < image["deviation"] < 2:
            warnings.append(
                f"image: the latents that a model would read have a standard deviation of {image['deviation']}, not "
                "about 1, so a diffusion model would see too much noise or too little. Set latent_scale and "
                "latent_shift in the run's objective.diffusion, or scaling_factor in the autoencoder's config.json."
            )
    elif image and config.image and image["psnr"] <= image["psnr_of_mean_colour"]:
        shown = config.image.model_dump()
        steps = ", ".join(f"{name} is {value}" for name, value in shown.items() if name.endswith("steps"))
        warnings.append(
            f"image: held-out pictures come back worse ({image['psnr']} dB) than painted all over in their mean colour "
            f"({image['psnr_of_mean_colour']} dB): a model can learn nothing from these tokens. Look at "
            f"reconstructions.png. Train for longer ({steps}), on more pictures (there were {image['images']}), with "
            "a lower learning_rate or smaller pictures (resolution); or use a pretrained tokenizer."
        )
    if image and image["psnr"] < image.get("psnr_without_network", -math.inf):
        warnings.append(
            f"image: held-out pictures come back worse with the decoder's network ({image['psnr']} dB) than by the "
            f"codebook alone ({image['psnr_without_network']} dB). Give more pictures (there were {image['images']}), "
            "or set image.steps to 0, which leaves the network out."
        )
    if image and image.get("usage_in_training", 1) < 0.5:
        warnings.append(
            f"image: only {image['usage_in_training']:.0%} of the {image['size']} codes occur in the pictures trained "
            f"on (as many as {image['perplexity_in_training']} equally frequent ones). The others cost parameters "
            "of the model and mean nothing. Give more pictures, or set a lower image.size."
        )
    if speech and speech["usage"] < 0.5:
        warnings.append(
            f"speech: only {speech['usage']:.0%} of the {speech['size']} units ever occur. Give more recordings, or "
            "set a lower speech.size."
        )
    return warnings


def _finished(directory: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of a stage that was trained before with the same recipe, or None."""
    try:
        record = json.loads((directory / "training.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return record["figures"] if record["recipe"] == recipe else None


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="recipe, such as configs/demo_tokenizers.yaml")
    add_input(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder of the tokenizers")
    parser.add_argument(
        "--vocoder", type=int, metavar="STEPS", help="also train a vocoder of the speech units, in so many steps"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: %(default)s)")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, or auto for a GPU where there is one (%(default)s)"
    )
    arguments = parser.parse_args()
    with exit_clearly():
        config = load_config(arguments.config)
        figures = train_tokenizers(
            config,
            files_of_side(arguments.input, "train")[0],  # what is held out in folders is not trained on
            arguments.output,
            arguments.seed,
            resolved_device(arguments.device),
            arguments.vocoder,
        )
        for name, found in figures.items():
            print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in found.items() if k != "losses"))
        for warning in warnings_of(config, figures):
            print(f"\nWARNING: {warning}", file=sys.stderr)


if __name__ == "__main__":
    main()
