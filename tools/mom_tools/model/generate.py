"""Sample interleaved text, pictures and speech from a trained run.

    mom generate runs/demo/run --prompt "The digit seven"
    mom generate RUN --prompt "a red nine" --start image --out samples/

    mom generate RUN --prompt "a red nine" --shape 2:1 1:1 4x16     # pictures of three shapes
    mom generate RUN --grid --prompts prompts.txt --samples 4       # one page and one contact sheet of them all

Writes OUT/sample-N.md with the text, pictures as PNG where the run's tokenizers can decode them (latents as .npy
besides), speech units as JSON, and as WAV where a vocoder is configured. `--start` opens a picture or a recording
right after the prompt; `--shape` a picture, of each of the shapes that are given, where the run has picture_shapes.
With --grid there is also OUT/grid.html, a page of all samples with play buttons, and OUT/grid.png, all pictures with
their captions. The same command goes on where it was ended.
"""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import argparse
import json
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mom_tokenizers.errors import UserError, exit_clearly, user_path
from mom_tokenizers.media.shapes import check_written
from mom_tools.options import add_device, add_tokenizers, add_weights, command_parser
from mom_train.config.files import checked
from mom_train.config.preflight import check_run, check_there, check_writable
from mom_train.config.sampling import PromptConfig, SamplingConfig


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--prompt", action="append", help="text to start from; several are each sampled from")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text file of further prompts, one a line")
    parser.add_argument("--grid", action="store_true", help="write a page of all samples, and a sheet of all pictures")
    parser.add_argument("--start", metavar="MODALITY", help="open a span, such as image or speech, after the prompt")
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="SHAPE",
        help="open a picture of this shape, width:height such as 2:1, or ROWSxCOLUMNS of tokens; of several, each",
    )
    add_weights(parser)
    parser.add_argument(
        "--samples", type=int, default=1, help="number of documents, of each prompt and shape (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the samples (default: RUN/samples, with --grid RUN/samples/grid)"
    )
    add_tokenizers(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.9, help="0 takes the likeliest id (default: %(default)s)"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="draw among the likeliest ids of this probability (%(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=512, help="most tokens, those of the prompt included (default: %(default)s)"
    )
    parser.add_argument("--patches", type=int, help="codes or patches of a picture (default: the image tokenizer's)")
    parser.add_argument("--denoising-steps", type=int, default=50, help="steps for a latent picture (%(default)s)")
    parser.add_argument(
        "--denoised-limit", type=float, default=4.0, help="largest value of a denoised latent (%(default)s)"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="guidance of pictures towards the prompt; 1 is none (default: %(default)s)",
    )
    add_device(parser)
    arguments = parser.parse_args()
    with exit_clearly():
        generate(arguments)


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    """The prompts of --prompt and then those of --prompts, without the file's empty lines. Without --grid there may be
    none, which is one that is empty. Raises UserError for a file without prompts."""
    prompts: list[str] = list(arguments.prompt or [])
    if arguments.prompts is not None:
        with user_path(arguments.prompts):
            lines = arguments.prompts.read_text(encoding="utf-8-sig").splitlines()
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"--prompts {arguments.prompts}: no prompt there; write one a line")
        prompts += found
    if arguments.grid and not prompts:
        raise UserError('--grid: give prompts, with --prompt or --prompts FILE (--prompt "" samples without one)')
    return prompts or [""]


@contextmanager
def _named(prompt: str, prompts: int) -> Iterator[None]:
    """Adds to a UserError which of several prompts it is about."""
    try:
        yield
    except UserError as error:
        if prompts == 1:
            raise
        raise UserError(f"prompt {prompt[:60]!r}: {error}") from error


def generate(arguments: argparse.Namespace) -> None:
    chosen = {name: getattr(arguments, name) for name in ("temperature", "top_p", "max_tokens", "guidance")}
    chosen["denoising_steps"] = arguments.denoising_steps
    checked(SamplingConfig, chosen)  # before PyTorch is imported, which takes seconds
    for name in ("samples", "patches", "denoised_limit"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be above 0")
    for shape in arguments.shape or ():
        check_written(shape)
    if arguments.shape and arguments.start not in (None, "image"):
        raise UserError(f"--shape: only a picture has one, and --start opens {arguments.start}")
    if min(arguments.seed, arguments.step or 0) < 0:
        raise UserError("--seed, --step: not below 0")
    texts = prompts_of(arguments)
    check_run(arguments.run)
    check_there("--tokenizers", arguments.tokenizers)
    folder: Path = arguments.out or arguments.run / ("samples/grid" if arguments.grid else "samples")
    check_writable(folder, "--out")

    import torch

    from mom_tokenizers.bundle import Tokenizers
    from mom_tools.model.prompt_grid import Job, draw_grid
    from mom_train.checkpoint.load import find_checkpoint, load_run
    from mom_train.generate.sampler import check_prompt, sample_document
    from mom_train.generate.samples import check_latents, prompt_segments, settings, write_span

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, config = load_run(arguments.run, arguments.step, device, "ema" if arguments.ema else "model")
    path = arguments.tokenizers or config.tokenizers
    if path is None:
        raise UserError(f"{arguments.run} names no tokenizers; give --tokenizers TOKENIZERS.yaml")
    config.check_guidance(arguments.guidance)
    tokenizers, vocab = Tokenizers.load(path), config.layout
    check_latents(tokenizers, model.diffusion)
    sampling = settings(tokenizers, arguments.patches, denoised_limit=arguments.denoised_limit, **chosen)
    start = "image" if arguments.shape else arguments.start
    prompts = {}
    for text in texts:
        for shape in arguments.shape or (None,):
            asked = PromptConfig(text=text, start=start, shape=shape)
            prompts[text, shape] = prompt_segments(asked, tokenizers, vocab, config.grid_of(asked))
            with _named(text, len(texts)):
                check_prompt(prompts[text, shape], sampling, model.diffusion)
    # Every prompt and shape is drawn with the same seeds.
    seeds = range(arguments.seed, arguments.seed + arguments.samples)
    jobs = [Job(text, shape, n) for text in texts for shape in arguments.shape or (None,) for n in seeds]
    folder.mkdir(parents=True, exist_ok=True)

    def draw(job: Job, name: str) -> list[str]:
        lines = [f"> {job.prompt}", ""] if job.prompt else []
        spans = sample_document(model, vocab, prompts[job.prompt, job.shape], sampling, job.seed)
        for i, (modality, values) in enumerate(spans):
            lines += [write_span(folder, f"{name}-{i}", modality, values, tokenizers).markdown, ""]
        (folder / f"{name}.md").write_text("\n".join(lines))
        return lines

    if arguments.grid:
        checkpoint = find_checkpoint(arguments.run, arguments.step)
        sums = {name: one.crc32 for name, one in checkpoint.sums().items()}
        checksum = zlib.crc32(json.dumps(sums, sort_keys=True).encode())
        made: dict[str, Any] = {"checkpoint": f"{checkpoint}, {checksum:08x}"}
        made |= {"weights": "ema" if arguments.ema else "model", "tokenizers": tokenizers.fingerprints()}
        made |= {"start": start, **asdict(sampling)}
        draw_grid(folder, jobs, made, f"Samples of {arguments.run}", draw)
        return
    for n, job in enumerate(jobs):
        lines = draw(job, f"sample-{n}")
        print(f"--- {folder / f'sample-{n}.md'}")
        print("\n".join(lines))


if __name__ == "__main__":
    main()
