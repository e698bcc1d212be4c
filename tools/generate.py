"""Text, pictures and speech from a trained run, interleaved.

    python tools/generate.py runs/demo/run --prompt "The digit seven"
    python tools/generate.py RUN --prompt "a red nine" --start image --out samples/

Writes OUT/sample-N.md with the text, pictures as PNG where the run's tokenizers can decode them (latents as .npy
besides), speech units as JSON, and as WAV where a vocoder is configured. `--start` opens a picture or a recording
right after the prompt.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from mom_data.errors import exit_clearly
from mom_data.shards import TokenSegment
from mom_tokenizers.bundle import Tokenizers
from mom_train.generation import Sampling, load_model, sample_document


def write_span(folder: Path, name: str, modality: str, values: list[int] | torch.Tensor, tokenizers: Tokenizers) -> str:
    """Save what a person can look at or listen to; returns its line of Markdown."""
    if isinstance(values, torch.Tensor):
        np.save(folder / f"{name}.npy", values.numpy())
        latents = f"[latents of a picture, {tuple(values.shape)}]({name}.npy)"
        image = tokenizers.tokenizer("image") if "image" in tokenizers.modalities else None
        if image is None or image.kind != "kl":
            return latents
        try:
            image.decode(values.numpy()).save(folder / f"{name}.png")
        except ValueError as error:
            return f"{latents} ({error})"
        return f"![picture]({name}.png)"
    if modality == "text":
        return str(tokenizers.tokenizer("text").decode(values))
    (folder / f"{name}.json").write_text(json.dumps({"modality": modality, "ids": values}) + "\n")
    try:
        decoded = tokenizers.tokenizer(modality).decode(values)
    except ValueError as error:
        return f"[{len(values)} {modality} ids]({name}.json) ({error})"
    if modality == "image":
        decoded.save(folder / f"{name}.png")
        return f"![picture]({name}.png)"
    import soundfile

    waveform, rate = decoded
    soundfile.write(folder / f"{name}.wav", waveform, rate)
    return f"[{len(values) / 25:.1f} s of speech]({name}.wav)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--prompt", default="", help="text to start from")
    parser.add_argument("--start", choices=["image", "speech"], help="open this span after the prompt")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="with the average of the weights (training.ema_decay)")
    parser.add_argument("--samples", type=int, default=1, help="documents (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder (default: RUN/samples)")
    parser.add_argument("--tokenizers", type=Path, help="tokenizers.yaml (default: the run's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=Sampling.temperature)
    parser.add_argument("--top-p", type=float, default=Sampling.top_p)
    parser.add_argument("--max-tokens", type=int, default=Sampling.max_tokens)
    parser.add_argument("--patches", type=int, help="codes or patches of a picture (default: the image tokenizer's)")
    parser.add_argument("--denoising-steps", type=int, default=Sampling.denoising_steps)
    parser.add_argument("--denoised-limit", type=float, default=Sampling.denoised_limit, help="(default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    with exit_clearly("generate"):
        model, config = load_model(arguments.run, arguments.step, arguments.device, arguments.ema)
        path = arguments.tokenizers or config.tokenizers
        if path is None:
            raise ValueError(f"{arguments.run} names no tokenizers; give --tokenizers TOKENIZERS.yaml")
        tokenizers, vocab = Tokenizers.load(path), config.layout
        patches = arguments.patches
        if patches is None and "image" in tokenizers.modalities:
            image = tokenizers.tokenizer("image")
            patches = getattr(image, "patches_per_image" if image.kind == "kl" else "codes_per_image", None)
        sampling = Sampling(
            sizes={m: int(d["size"]) for m, d in tokenizers.describe().items()},
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            max_tokens=arguments.max_tokens,
            patches_per_picture=patches or Sampling.patches_per_picture,
            denoising_steps=arguments.denoising_steps,
            denoised_limit=arguments.denoised_limit,
            guidance=arguments.guidance,
        )
        prompt = []
        if arguments.prompt:
            prompt.append(TokenSegment(0, tokenizers.encode("text", arguments.prompt)))
        if arguments.start:
            if arguments.start not in vocab.modalities:
                raise ValueError(f"this run has no modality '{arguments.start}', only {', '.join(vocab.modalities)}")
            prompt.append(TokenSegment(vocab.modalities.index(arguments.start), np.zeros(0, np.uint32)))
        folder: Path = arguments.out or arguments.run / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        for n in range(arguments.samples):
            lines = [f"> {arguments.prompt}", ""] if arguments.prompt else []
            spans = sample_document(model, vocab, prompt, sampling, arguments.seed + n)
            for i, (modality, values) in enumerate(spans):
                lines += [write_span(folder, f"sample-{n}-{i}", modality, values, tokenizers), ""]
            (folder / f"sample-{n}.md").write_text("\n".join(lines))
            print(f"--- {folder / f'sample-{n}.md'}")
            print("\n".join(lines))


if __name__ == "__main__":
    main()
