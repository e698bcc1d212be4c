"""Train small tokenizers from raw documents: byte-level BPE, a VQ autoencoder, k-means speech units.

    python tools/train_tokenizers.py --config configs/demo_tokenizers.yaml --input 'raw/train-*.tar' --output DIR

DIR gets text/, image/, speech/, tokenizers.yaml (what tokenize_shards.py takes), training.json (figures) and
reconstructions.png (held-out pictures above what their codes bring back). A stage whose result is there already,
from the same config, inputs and seed, is not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from tqdm import tqdm

from mom_data.document import BadSample, Document, expand_inputs, read_documents
from mom_data.errors import exit_clearly
from mom_tokenizers.image import VQImageTokenizer, decode_image, preprocess
from mom_tokenizers.speech import SpeechTokenizer, Waveform, decode_audio
from mom_tokenizers.text import TextTokenizer

if TYPE_CHECKING:
    import torch

KINDS = {"text": TextTokenizer.kind, "image": VQImageTokenizer.kind, "speech": SpeechTokenizer.kind}
LOG_EVERY = 25  # steps
REVIVE_EVERY = 25  # steps; a code unused for so long takes the place of some picture's latent
COLOUR_WEIGHT = 2.0
SHOWN = 16  # pictures in reconstructions.png


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextConfig(_Strict):
    size: int = Field(ge=256)
    max_documents: PositiveInt = 20_000


class ImageConfig(_Strict):
    size: int = Field(ge=2)
    resolution: PositiveInt
    block_out_channels: tuple[PositiveInt, ...]
    latent_channels: PositiveInt = 16
    layers_per_block: PositiveInt = 1
    attention: bool = False
    max_images: int = Field(20_000, ge=20)
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 2e-3
    autoencoder_steps: PositiveInt
    quantized_steps: PositiveInt


class SpeechConfig(_Strict):
    size: int = Field(ge=2)
    extractor: Literal["log_mel", "hubert"] = "log_mel"
    model: str | None = None  # hubert: a folder with config.json and safetensors weights
    layer: int | None = None
    max_seconds: PositiveFloat = 20_000


class Config(_Strict):
    text: TextConfig
    image: ImageConfig | None = None
    speech: SpeechConfig | None = None


def load_config(path: Path) -> Config:
    """Raises ValueError that names every wrong key."""
    try:
        return Config.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(file)'}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"{path}:\n" + "\n".join(lines)) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error


@dataclass
class Sample:
    """What was drawn from the corpus."""

    texts: list[str] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)  # uint8 (3, resolution, resolution)
    waveforms: list[Waveform] = field(default_factory=list)
    unreadable: int = 0


def draw_sample(files: list[Path], config: Config, modalities: set[str], seed: int) -> Sample:
    """Up to the configured caps, spread evenly over the files: each gives its share of what is still wanted."""
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
                            raise ValueError("shorter than a unit")
                        sample.waveforms.append((waveform, rate))
                        taken["speech"] += len(waveform) / rate
                except ValueError:
                    sample.unreadable += 1
    for modality, amount in taken.items():
        if not amount:
            raise ValueError(
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


def train_speech(config: SpeechConfig, sample: Sample, directory: Path, seed: int) -> dict[str, Any]:
    tokenizer = SpeechTokenizer.train(
        tqdm(sample.waveforms, desc="speech", unit="clip"),
        config.size,
        extractor=config.extractor,
        model=config.model,
        layer=config.layer,
        seed=seed,
    )
    tokenizer.save(directory)
    units = np.concatenate(tokenizer.encode_batch(sample.waveforms[:200]))
    return {
        "clips": len(sample.waveforms),
        "seconds_of_speech": round(sum(len(w) / rate for w, rate in sample.waveforms), 1),
        "size": tokenizer.size,
        **usage(units, tokenizer.size),
    }


def usage(codes: np.ndarray, size: int) -> dict[str, float]:
    """Share of ids that occur, and perplexity: how many equally frequent ids would be as varied."""
    shares = np.bincount(codes.ravel(), minlength=size) / codes.size
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    return {"usage": round(float((shares > 0).mean()), 4), "perplexity": round(math.exp(entropy), 1)}


def train_image(config: ImageConfig, sample: Sample, directory: Path, seed: int) -> dict[str, Any]:
    """First a plain autoencoder, then k-means of its latents as codebook, then both together with quantisation."""
    import torch
    from diffusers import VQModel

    if len(sample.images) < 20:
        raise ValueError(f"{len(sample.images)} pictures are too few to train and hold out; give at least 20")
    torch.manual_seed(seed)
    levels = len(config.block_out_channels)
    model: Any = VQModel(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        vq_embed_dim=config.latent_channels,
        sample_size=config.resolution,
        num_vq_embeddings=config.size,
        # one channel a group would be instance norm, which forgets the picture's colour
        norm_num_groups=max(1, math.gcd(32, *config.block_out_channels) // 4),
        mid_block_add_attention=config.attention,
    )
    tokenizer = VQImageTokenizer(model, config.resolution)  # checks resolution against levels
    pixels = torch.from_numpy(np.stack(sample.images)).contiguous(memory_format=torch.channels_last)
    pixels = pixels[torch.from_numpy(np.random.default_rng(seed).permutation(len(pixels)))]
    held_out = min(256, max(SHOWN, len(pixels) // 20))
    test, train = pixels[:held_out], pixels[held_out:]
    # channels_last: a third faster on CPUs, for these few channels
    model.to(memory_format=torch.channels_last).train().requires_grad_(True)
    losses = _optimize(model, train, config)
    model.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    tokenizer.save(directory)

    with torch.inference_mode():
        originals = _scaled(test)
        codes = torch.cat([tokenizer.quantize(batch) for batch in originals.split(64)]).numpy()
        # for comparison: what the autoencoder loses without its codebook
        unquantized = torch.cat(
            [model.decode(model.encode(b).latents, force_not_quantize=True).sample for b in originals.split(64)]
        )
    decoded = np.stack([np.asarray(tokenizer.decode(c)).transpose(2, 0, 1) for c in codes])
    _draw(test[:SHOWN].numpy(), decoded[:SHOWN], directory / "reconstructions.png")
    reference = test.numpy() / 255
    plain = ((unquantized.clamp(-1, 1) + 1) / 2).numpy()
    return {
        "images": len(train),
        "held_out": held_out,
        "size": tokenizer.size,
        "codes_per_image": tokenizer.codes_per_image,
        "psnr": psnr(decoded / 255, reference),
        "psnr_without_quantization": psnr(plain, reference),
        "psnr_of_mean_colour": psnr(np.broadcast_to(reference.mean((2, 3), keepdims=True), reference.shape), reference),
        **usage(codes, tokenizer.size),
        "losses": losses,
    }


def psnr(pictures: np.ndarray, originals: np.ndarray) -> float:
    """Mean over pictures (N, C, H, W) in [0, 1] of the peak signal-to-noise ratio, in dB."""
    error = ((pictures - originals) ** 2).mean(axis=(1, 2, 3))
    return round(float((-10 * np.log10(np.maximum(error, 1e-10))).mean()), 2)


def _scaled(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


def _optimize(model: Any, train: torch.Tensor, config: ImageConfig) -> list[dict[str, float]]:
    import torch

    steps = config.autoencoder_steps + config.quantized_steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=steps, pct_start=0.08, cycle_momentum=False
    )
    quantize: Any = model.quantize
    counts = torch.zeros(config.size)
    losses = []
    for step in tqdm(range(steps), desc="image", unit="step"):
        quantized = step >= config.autoencoder_steps
        if step == config.autoencoder_steps:
            _initialize_codebook(model, train, config.size)
        pixels = _scaled(train[torch.randint(len(train), (config.batch_size,))])
        latents = model.encode(pixels).latents
        commitment = torch.zeros(())
        decoder_input = latents
        if quantized:
            decoder_input, commitment, (_, _, codes) = quantize(latents)
            counts += torch.bincount(codes, minlength=config.size)
        difference = model.decode(decoder_input, force_not_quantize=True).sample - pixels
        # Colour differences are small beside brightness: unweighted, hundreds of steps pass before they are learned.
        colour = difference - difference.mean(dim=1, keepdim=True)
        reconstruction = sum(d.abs().mean() + d.square().mean() for d in (difference, COLOUR_WEIGHT * colour))
        optimizer.zero_grad(set_to_none=True)
        (reconstruction + commitment).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        since = step - config.autoencoder_steps + 1
        # not in the last quarter: a fresh code needs steps to find its place
        if quantized and since % REVIVE_EVERY == 0:
            if since < 0.75 * config.quantized_steps:
                _revive(quantize.embedding.weight, latents, counts)
            counts.zero_()
        if step % LOG_EVERY == 0 or step == steps - 1:
            mse = float(difference.detach().square().mean())
            losses.append({"step": step, "mse": round(mse, 6), "commitment": round(float(commitment.detach()), 6)})
    return losses


def _initialize_codebook(model: Any, train: torch.Tensor, size: int) -> None:
    import torch
    from sklearn.cluster import MiniBatchKMeans

    with torch.no_grad():
        batches = _scaled(train[:1024]).split(64)
        latents = torch.cat([model.encode(b).latents.permute(0, 2, 3, 1).flatten(0, 2) for b in batches]).numpy()
        if len(latents) < size:
            raise ValueError(f"image: {len(latents)} patches are too few for {size} codes; give more pictures")
        kmeans = MiniBatchKMeans(size, batch_size=4096, max_iter=20, n_init=1, random_state=0).fit(latents)
        embedding: Any = model.quantize.embedding
        embedding.weight.copy_(torch.from_numpy(kmeans.cluster_centers_))


def _revive(weight: torch.Tensor, latents: torch.Tensor, counts: torch.Tensor) -> None:
    """Unused codes (counts 0) take the place of latents drawn from the batch, the worst served first."""
    import torch

    with torch.no_grad():
        unused = (counts == 0).nonzero()[:, 0]
        if len(unused) == 0:
            return
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
        distance = torch.cdist(flat, weight).amin(dim=1)
        chosen = torch.multinomial(distance + 1e-8, min(len(unused), len(flat)))
        weight[unused[: len(chosen)]] = flat[chosen]


def _draw(originals: np.ndarray, decoded: np.ndarray, file: Path) -> None:
    """PNG: a row of originals above a row of reconstructions, uint8 (N, 3, H, W), enlarged to at least 96 pixels."""
    gap = 2
    rows = [
        np.concatenate([np.pad(p, ((0, 0), (gap, gap), (gap, gap)), constant_values=128) for p in pictures], axis=2)
        for pictures in (originals, decoded)
    ]
    sheet = Image.fromarray(np.concatenate(rows, axis=1).transpose(1, 2, 0))
    factor = max(1, 96 // originals.shape[-1])
    sheet.resize((sheet.width * factor, sheet.height * factor), Image.Resampling.NEAREST).save(file)


# --------------------------------------------------------------------------------------------- the whole


def train_tokenizers(config: Config, files: list[Path], output: Path, seed: int) -> dict[str, Any]:
    """Train what is missing under `output`; returns the figures of all stages."""
    inputs = [[f.name, f.stat().st_size] for f in files]
    stages = {name: c for name in KINDS if (c := getattr(config, name)) is not None}
    recipes = {n: {"config": c.model_dump(mode="json"), "inputs": inputs, "seed": seed} for n, c in stages.items()}
    figures = {name: _finished(output / name, recipe) for name, recipe in recipes.items()}
    missing = {name for name, found in figures.items() if found is None}
    if missing:
        output.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        sample = draw_sample(files, config, missing, seed)
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
            found = train_image(config.image, sample, partial, seed)
        else:
            assert config.speech
            found = train_speech(config.speech, sample, partial, seed)
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

    declared = {name: {"kind": KINDS[name], "path": name} for name in stages}
    _replace(output / "tokenizers.yaml", yaml.safe_dump(declared, sort_keys=False).encode())
    _replace(output / "training.json", (json.dumps(figures, indent=1) + "\n").encode())
    if "image" in stages:
        _replace(output / "reconstructions.png", (output / "image" / "reconstructions.png").read_bytes())
    return figures


def _finished(directory: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """Figures of a stage that was trained by the same recipe."""
    try:
        record = json.loads((directory / "training.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return record["figures"] if record["recipe"] == recipe else None


def _replace(file: Path, content: bytes) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="sizes and steps, e.g. configs/demo_tokenizers.yaml")
    parser.add_argument("--input", nargs="+", required=True, help="raw documents: files, globs or folders")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    arguments = parser.parse_args()
    with exit_clearly("train_tokenizers"):
        figures = train_tokenizers(
            load_config(arguments.config), expand_inputs(arguments.input), arguments.output, arguments.seed
        )
        for name, found in figures.items():
            print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in found.items() if k != "losses"))


if __name__ == "__main__":
    main()
