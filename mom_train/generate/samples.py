"""Sampled documents as files that people can look at and listen to, and the samples of a model in training."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mom_data.shards.format import TokenSegment
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import UserError
from mom_tokenizers.media.shapes import Grid
from mom_tokenizers.vocab import VocabLayout
from mom_train.config.model import DiffusionConfig
from mom_train.config.run import RunConfig
from mom_train.config.sampling import PromptConfig
from mom_train.distributed.ranks import Ranks
from mom_train.generate.sampler import Sampling, Values, check_prompt, sample_document
from mom_train.model.language_model import LanguageModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """One span of a sampled document, as it was saved."""

    name: str
    """The name of its files, without extension."""
    modality: str
    markdown: str
    """Its text, or a line that names its file. Where the span cannot be shown or played, the line says why."""
    decoded: Any = None
    """The decoded value: a str, a PIL picture, or (float32 waveform (n,), rate in Hz)."""


def settings(tokenizers: Tokenizers, patches: int | None = None, **chosen: Any) -> Sampling:
    """The sampling settings for what these tokenizers can decode."""
    if patches is None and "image" in tokenizers.modalities:
        image = tokenizers.tokenizer("image")
        patches = getattr(image, "patches_per_image" if image.kind == "kl" else "codes_per_image", None)
    described = tokenizers.describe()
    return Sampling(
        sizes={modality: int(d["size"]) for modality, d in described.items()},
        codebooks={m: int(d["codebooks"]) for m, d in described.items() if "codebooks" in d} or None,
        patches_per_picture=patches or Sampling.patches_per_picture,
        **chosen,
    )


def check_latents(tokenizers: Tokenizers, diffusion: DiffusionConfig | None) -> None:
    """Raises UserError where the model's pictures are latents of another width than the tokenizer decodes."""
    described = tokenizers.describe().get("image", {})
    width = described.get("patch_width")
    if diffusion is not None and width is not None and width != diffusion.patch_width:
        raise UserError(
            f"the model makes patches of {diffusion.patch_width} values (objective.diffusion.patch_width), but those "
            f"of the image tokenizer, {described.get('model_class', 'AutoencoderKL')} {described['fingerprint']}, have "
            f"{width}: take the tokenizers with which the model's shards were made"
        )


def prompt_segments(
    prompt: PromptConfig, tokenizers: Tokenizers, vocab: VocabLayout, grid: Grid | None = None
) -> list[TokenSegment]:
    """The prompt as segments of ids. `grid` is the (rows, columns) of the picture that it opens, None for a square one.
    Raises UserError for a span that the model cannot write."""
    if prompt.start is not None and prompt.start not in vocab.modalities[1:]:
        further = ", ".join(vocab.modalities[1:]) or "none"
        raise UserError(f"this run has no spans of '{prompt.start}' to open; the modalities beside text are: {further}")
    segments = []
    if prompt.text:
        segments.append(TokenSegment(0, tokenizers.encode("text", prompt.text)))
    if prompt.start is not None:
        segments.append(TokenSegment(vocab.modalities.index(prompt.start), np.zeros(0, np.uint32), grid))
    return segments


def write_span(folder: Path, name: str, modality: str, values: Values, tokenizers: Tokenizers) -> Span:
    """Saves a span as NAME.png or NAME.wav, and its ids as NAME.json or its latents as NAME.npy. Text is not saved.
    `values` are as `Sampler.span` gives them; the JSON of a picture that is not square also has its rows and
    columns."""
    if modality == "text":
        text = str(tokenizers.tokenizer("text").decode(values))  # type: ignore[arg-type]
        return Span(name, modality, text, text)
    if isinstance(values, Tensor):
        np.save(folder / f"{name}.npy", values.numpy())
        instead = f"[latents of a picture, {tuple(values.shape)}]({name}.npy)"
        image = tokenizers.tokenizer("image") if "image" in tokenizers.modalities else None
        if image is None or image.kind != "kl":
            return Span(name, modality, instead)
    else:
        written: dict[str, Any] = {"modality": modality, "ids": np.asarray(values, np.int64).ravel().tolist()}
        if isinstance(values, np.ndarray) and values.ndim == 2:
            written |= dict(zip(("rows", "columns"), values.shape, strict=True))
        (folder / f"{name}.json").write_text(json.dumps(written) + "\n")
        instead = f"[{len(written['ids'])} {modality} ids]({name}.json)"
    try:
        decoded = tokenizers.tokenizer(modality).decode(values.numpy() if isinstance(values, Tensor) else values)
    except UserError as error:  # such as a picture of too few codes, which a model may well write
        return Span(name, modality, f"{instead} ({error})")
    if modality == "image":
        decoded.save(folder / f"{name}.png")
        return Span(name, modality, f"![picture]({name}.png)", decoded)
    import soundfile

    waveform, rate = decoded
    soundfile.write(folder / f"{name}.wav", waveform, rate)
    return Span(name, modality, f"[{len(waveform) / rate:.1f} s of speech]({name}.wav)", decoded)


class TrainingSampler:
    """Writes samples of a sharded model in training. Rank 0 samples with a copy of the whole model while the others
    wait. Tokenizers are loaded by the constructor, so that what is wrong with them shows at the start of the run."""

    def __init__(self, config: RunConfig, ranks: Ranks):
        assert config.tokenizers is not None
        self._config, self._ranks, self._vocab = config, ranks, config.layout
        self._tokenizers: Tokenizers | None = None
        if ranks.main:
            chosen = config.sampling
            self._tokenizers = Tokenizers.load(config.tokenizers)
            check_latents(self._tokenizers, config.objective.diffusion)
            self._sampling = settings(
                self._tokenizers,
                temperature=chosen.temperature,
                top_p=chosen.top_p,
                max_tokens=chosen.max_tokens,
                denoising_steps=chosen.denoising_steps,
                guidance=chosen.guidance,
            )
            for prompt in chosen.prompts:
                segments = prompt_segments(prompt, self._tokenizers, self._vocab)
                check_prompt(segments, self._sampling, config.objective.diffusion)

    def sample(self, model: LanguageModel, step: int, interrupted: Callable[[], bool] = bool) -> list[list[Span]]:
        """Samples a document for each prompt, saves it in RUN/samples/step-N, and returns its spans, the prompt's text
        first. Ranks other than 0 return nothing.
        `interrupted`, asked on rank 0 alone, leaves the rest out. Collective. What goes wrong is logged and does not
        end the run."""
        documents: list[list[Span]] = []
        whole = self._whole(model)
        if whole is not None:
            try:
                documents = self._written(whole, step, interrupted)
            except (OSError, torch.OutOfMemoryError) as error:
                log.warning("no samples of step %d: %s", step, error)
        dist.all_reduce(torch.zeros(1))  # the others wait here, where no clock runs
        return documents

    @torch.no_grad()
    def _whole(self, model: LanguageModel) -> LanguageModel | None:
        """Returns on rank 0 a copy of the model that is not sharded. It is gathered one parameter at a time."""
        whole = None
        if self._ranks.main:
            try:
                with torch.device("meta"):
                    M = len(self._vocab.modalities)
                    whole = LanguageModel(model.config, self._vocab.size, M, diffusion=model.diffusion)
                whole.to_empty(device=self._ranks.device)
            except torch.OutOfMemoryError as error:
                log.warning("no room on rank 0 for a copy of the model, so no samples: %s", error)
                whole = None
        copies = {} if whole is None else dict(whole.named_parameters())
        for name, parameter in model.named_parameters():
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if name in copies:
                copies[name].copy_(value)
        return whole if whole is None else whole.eval()

    def _written(self, model: LanguageModel, step: int, interrupted: Callable[[], bool]) -> list[list[Span]]:
        assert self._tokenizers is not None
        folder = self._config.run_dir / "samples" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        documents: list[list[Span]] = []
        for n, prompt in enumerate(self._config.sampling.prompts):
            if interrupted() or time.monotonic() - begun > self._config.sampling.seconds:
                log.warning("samples of step %d: %d of %d", step, n, len(self._config.sampling.prompts))
                break
            segments = prompt_segments(prompt, self._tokenizers, self._vocab, self._config.grid_of(prompt))
            made = sample_document(model, self._vocab, segments, self._sampling, self._config.seed + n)
            spans = [Span(f"{n}", "text", f"> {prompt.text}", prompt.text)] if prompt.text else []
            for i, (modality, values) in enumerate(made):
                spans.append(write_span(folder, f"{n}-{i}", modality, values, self._tokenizers))
            documents.append(spans)
        text = "\n\n---\n\n".join("\n\n".join(span.markdown for span in spans) for spans in documents)
        (folder / "text.txt").write_text(text + "\n")
        return documents
