"""Sampling interleaved documents from a trained model: text, pictures (codes or denoised latents), speech units.

    text --BOI--> exactly one picture --EOI--> text --BOSP--> speech units --EOSP--> text ... --EOS

Where pictures have several shapes, the token that opens one says its rows and columns, and so how many tokens follow.

Inside a span only the ids that may stand there can be sampled, so every picture is whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mom_data.shards.format import TokenSegment
from mom_tokenizers.errors import UserError
from mom_tokenizers.media.shapes import Grid
from mom_tokenizers.speech.delay import DelayedCodebooks
from mom_tokenizers.vocab import VocabLayout
from mom_train.config.files import checked
from mom_train.config.model import DiffusionConfig
from mom_train.config.sampling import SamplingConfig
from mom_train.model.diffusion import NoisedPatches, cosine_alpha_bar, levels, without_condition
from mom_train.model.language_model import LanguageModel, LayerStates
from mom_train.ops.layout import RowLayout

Values = list[int] | np.ndarray | Tensor
"""The values of a sampled span; see `Sampler.span`."""


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.9
    """The temperature of the softmax. 0 always takes the most likely id."""
    top_p: float = 0.95
    """Ids are sampled from the most likely ones, which together have this probability."""
    max_tokens: int = 512
    """The document ends after this many positions at the latest."""
    patches_per_picture: int = 64
    """The number of codes, or of latent patches, of a square picture."""
    max_units: int = 250
    """The longest span of speech, in units (25 a second for log-mel units)."""
    denoising_steps: int = 50
    """The number of steps of DDIM, or of Euler's method for a rectified flow."""
    denoised_limit: float = 4.0
    """DDIM's estimates of the clean, scaled latents are clipped to plus or minus this. At the first steps nearly all is
    noise; they divide by almost zero, and a small error of the model would become large."""
    sizes: Mapping[str, int] | None = None
    """The number of ids that each modality's tokenizer really has, where the vocabulary's spans are wider. No other
    ids are sampled."""
    codebooks: Mapping[str, int] | None = None
    """The number of codebooks of modalities whose codec writes several in the delay pattern. Spans of it are sampled
    so that they are whole recordings."""
    guidance: float = 1.0
    """The strength w of classifier-free guidance of pictures. 1 means none. With u and c, what the model predicts
    without and with its condition, u + w (c - u) is taken instead of c. For latents, this needs a model that was
    trained with objective.diffusion.condition_dropout. For codes, c and u are logits, and u is of the same picture in a
    document that begins with it, so it needs documents in which pictures stand first."""

    def __post_init__(self) -> None:
        """Raises UserError for settings with which nothing can be sampled."""
        same = ("temperature", "top_p", "max_tokens", "denoising_steps", "guidance")
        checked(SamplingConfig, {name: getattr(self, name) for name in same})
        for name in ("patches_per_picture", "max_units", "denoised_limit"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: {getattr(self, name)} is not above 0")


class Sampler:
    """Writes one document: it holds the ids so far and the model's state after them."""

    def __init__(self, model: LanguageModel, vocab: VocabLayout, sampling: Sampling, seed: int):
        self.model, self.vocab, self.sampling = model, vocab, sampling
        self.device = model.head.weight.device
        self.generator = torch.Generator().manual_seed(seed)
        self.state: LayerStates = model.empty_state(1)
        self.unconditional: LayerStates = model.empty_state(1)
        """The state after the same positions without their condition, which classifier-free guidance compares with."""
        self.position = 0
        self.logits_V = torch.empty(0)

    # ---- reading ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, ids: Sequence[int], modality: int = 0) -> None:
        """Lets the model read ids of one modality. An empty list changes nothing."""
        if not ids:
            return
        layout = self._layout(len(ids), modality)
        tokens = torch.tensor(ids, device=self.device)
        logits_TV, _ = self.model(tokens, layout, state=self.state)
        if self._guided:
            self.model(without_condition(tokens, self.vocab), layout, state=self.unconditional)
        self.position += len(ids)
        self.logits_V = logits_TV[-1].float().cpu()

    @property
    def _guided(self) -> bool:
        """Whether pictures of latents are guided."""
        return self.sampling.guidance != 1.0 and self.model.patch_head is not None

    def _layout(self, length: int, modality: int, picture: bool = False) -> RowLayout:
        """The layout of a chunk of one row and one modality that continues the document."""
        shape = (1, length)
        return RowLayout.sort(
            torch.full(shape, modality, dtype=torch.uint8, device=self.device),
            torch.zeros(shape, dtype=torch.int32, device=self.device),
            len(self.vocab.modalities),
            past_B=torch.tensor([self.position], device=self.device),
            picture_BL=torch.zeros(shape, dtype=torch.int32, device=self.device) if picture else None,
        )

    # ---- writing ------------------------------------------------------------------------------------------

    def choose(self, allowed: Tensor, unconditional: Sampler | None = None) -> int:
        """Samples an id among `allowed` (V,) bool, by temperature and top-p, and by guidance away from what the
        `unconditional` document would go on with."""
        logits_V = self.logits_V
        if unconditional is not None:
            logits_V = unconditional.logits_V + self.sampling.guidance * (logits_V - unconditional.logits_V)
        logits_V = logits_V.masked_fill(~allowed, -torch.inf)
        if self.sampling.temperature == 0:
            return int(logits_V.argmax())
        p, ids = torch.softmax(logits_V / self.sampling.temperature, -1).sort(descending=True)
        p[p.cumsum(0) - p >= self.sampling.top_p] = 0
        return int(ids[torch.multinomial(p, 1, generator=self.generator)])

    def spans(self) -> Iterator[tuple[str, Values]]:
        """Yields the spans that follow what was read, until EOS or `max_tokens`: (modality, values), as `span` gives
        them."""
        vocab, specials = self.vocab, self.vocab.specials
        openings: dict[int, tuple[str, Grid | None]] = {id_: ("image", grid) for grid, id_ in vocab.openings.items()}
        openings |= {vocab.brackets(m)[0]: (m, None) for m in vocab.modalities[1:]}
        free = torch.zeros(vocab.size, dtype=torch.bool)
        free[: self._size("text")] = True
        free[torch.from_numpy(vocab.modality_of_id != 0)] = False  # codes may lie among the text's ids
        free[list(specials.values())] = False
        free[[specials["eos"], *openings]] = True
        text: list[int] = []
        while self.position < self.sampling.max_tokens:
            token = self.choose(free)
            if token == specials["eos"]:
                break
            self.read([token])
            if token not in openings:
                text.append(token)
                continue
            if text:
                yield "text", text
                text = []
            modality, grid = openings[token]
            yield modality, self.span(modality, grid)
            self.read([vocab.brackets(modality)[1]])
        if text:
            yield "text", text

    def span(self, modality: str, grid: Grid | None = None) -> Values:
        """Writes one span after its opening token: local ids, or the latents (P, W) of a picture. With `grid`, the
        (rows, columns) of a picture that is not square, they are (rows, columns) uint32, or (rows, columns, W)."""
        count = None if grid is None else grid[0] * grid[1]
        if modality == "image" and self.model.patch_head is not None:
            latents = self.picture(count)
            return latents if grid is None else latents.view(*grid, -1)
        ids = self.codes(modality, count, self._alone(grid) if modality == "image" else None)
        return ids if grid is None else np.array(ids, np.uint32).reshape(grid)

    def _size(self, modality: str) -> int:
        span = dict(self.vocab.sizes)[modality]
        return min(span, (self.sampling.sizes or {}).get(modality, span))

    def _alone(self, grid: Grid | None) -> Sampler | None:
        """A document that begins with the picture that was just opened, for the guidance of codes."""
        if self.sampling.guidance == 1.0:
            return None
        alone = Sampler(self.model, self.vocab, self.sampling, 0)
        alone.read([self.vocab.specials["bos"], self.vocab.opening("image", grid)])
        return alone

    def codes(self, modality: str, count: int | None = None, unconditional: Sampler | None = None) -> list[int]:
        """Samples the local ids of one span: a whole picture, of `count` codes where that is given, or units until the
        closing bracket. With guidance, the `unconditional` document reads them as well."""
        if (self.sampling.codebooks or {}).get(modality, 1) > 1:
            return self._delayed_codes(modality)
        number = self.vocab.modalities.index(modality)
        allowed = torch.zeros(self.vocab.size, dtype=torch.bool)
        allowed[torch.from_numpy(self.vocab.ids(modality, np.arange(self._size(modality))))] = True
        fixed = modality == "image"
        closing = self.vocab.brackets(modality)[1]
        ids: list[int] = []
        for i in range((count or self.sampling.patches_per_picture) if fixed else self.sampling.max_units):
            allowed[closing] = not fixed and i > 0
            token = self.choose(allowed, unconditional)
            if token == closing:
                break
            ids.append(int(self.vocab.codes(modality, np.array(token))))
            for document in (self,) if unconditional is None else (self, unconditional):
                document.read([token], number)
        return ids

    def _delayed_codes(self, modality: str) -> list[int]:
        """Samples the local ids of a recording in the delay pattern, with at most `max_units` codes."""
        codebooks = (self.sampling.codebooks or {})[modality]
        number, size = self.vocab.modalities.index(modality), self._size(modality) // codebooks
        state = DelayedCodebooks(codebooks)
        ids: list[int] = []
        while choices := state.allowed():
            if state.frames >= max(1, self.sampling.max_units // codebooks):
                choices = choices[-1:]  # of two, the one that ends the recording
            allowed = torch.zeros(self.vocab.size, dtype=torch.bool)
            for codebook in choices:
                local = np.arange(codebook * size, (codebook + 1) * size)
                allowed[torch.from_numpy(self.vocab.ids(modality, local))] = True
            token = self.choose(allowed)
            ids.append(int(self.vocab.codes(modality, np.array(token))))
            state.take(ids[-1] // size)
            self.read([token], number)
        return ids

    @torch.no_grad()
    def picture(self, count: int | None = None) -> Tensor:
        """Denoises the latents (P, W) of one picture from the state after its opening bracket, then reads them,
        clean. P is `count` where that is given."""
        config = self.model.diffusion
        assert config is not None
        P = count or self.sampling.patches_per_picture
        layout = self._layout(P, self.vocab.modalities.index("image"), picture=True)
        tokens = torch.full((P,), self.vocab.specials["null"], device=self.device)
        zeros = torch.zeros(P, dtype=torch.int64, device=self.device)

        alpha = config.alpha(P)

        def predict(x_PW: Tensor, t: int, state: LayerStates) -> Tensor:
            told = levels(config, np.array([t]), np.array([alpha]))[2][0] if config.shifted else t
            timestep = torch.tensor([told], device=self.device)
            patches = NoisedPatches(x_PW, x_PW, layout.order.long(), zeros, timestep)
            _, predicted = self.model(tokens, layout, None, patches, [replace(s) for s in state])
            return predicted

        def guided(x_PW: Tensor, t: int) -> Tensor:
            conditional = predict(x_PW, t, self.state)
            if not self._guided:
                return conditional
            without = predict(x_PW, t, self.unconditional)
            return without + self.sampling.guidance * (conditional - without)

        x = torch.randn(P, config.patch_width, generator=self.generator).to(self.device)
        for t, following in timesteps(config, self.sampling.denoising_steps):
            x = denoise(x, guided(x, t), t, following, config, self.sampling.denoised_limit, alpha)
        for state in (self.state, self.unconditional) if self._guided else (self.state,):
            clean = NoisedPatches(x, x, layout.order.long(), zeros, torch.tensor([0], device=self.device))
            self.model(tokens, layout, None, clean, state)
        self.position += P
        return (x / (config.latent_scale or 1.0) + (config.latent_shift or 0.0)).cpu()


def timesteps(config: DiffusionConfig, steps: int) -> list[tuple[int, int]]:
    """Pairs (t, next t) from T-1 down to -1, which stands for no noise, with "trailing" spacing."""
    at = [round(config.steps - i * config.steps / steps) - 1 for i in range(steps)]
    return list(zip(at, [*at[1:], -1], strict=True))


def denoise(
    x: Tensor,
    predicted: Tensor,
    t: int,
    following: int,
    config: DiffusionConfig,
    limit: float = math.inf,
    alpha: float = 1.0,
) -> Tensor:
    """Takes one deterministic step from timestep `t` to `following`: DDIM (eta = 0) with its estimate of x_0 clipped to
    plus or minus `limit`, or Euler's method for a rectified flow. `alpha` is the picture's shift of the schedule."""
    if config.shifted:
        of_data, of_noise, _ = levels(config, np.array([t, following]), np.array(alpha))
        if config.prediction == "flow":
            return x - float(of_noise[0] - of_noise[1]) * predicted
        a, b = (float(factor) ** 2 for factor in of_data)
    elif config.prediction == "flow":
        return x - (t - following) / config.steps * predicted
    else:
        table = cosine_alpha_bar(config.steps)
        a, b = float(table[t]), float(table[following]) if following >= 0 else 1.0
    if config.prediction == "v":
        x0, epsilon = a**0.5 * x - (1 - a) ** 0.5 * predicted, a**0.5 * predicted + (1 - a) ** 0.5 * x
    else:
        x0, epsilon = (x - (1 - a) ** 0.5 * predicted) / a**0.5, predicted
    return b**0.5 * x0.clamp(-limit, limit) + (1 - b) ** 0.5 * epsilon


def check_prompt(prompt: Sequence[TokenSegment], sampling: Sampling, diffusion: DiffusionConfig | None) -> None:
    """Raises UserError where a model of this objective cannot do what is asked of it, or where the prompt leaves no
    room for anything."""
    if diffusion is not None and sampling.denoising_steps > diffusion.steps:
        raise UserError(f"{sampling.denoising_steps} denoising steps, of {diffusion.steps} that the model has learned")
    length = 1 + sum(len(segment.values) + 2 * (segment.modality != 0) for segment in prompt)  # <bos> and brackets
    opens = any(segment.modality != 0 and not len(segment.values) for segment in prompt)
    if length >= sampling.max_tokens and not opens:
        raise UserError(
            f"the prompt takes {length} positions of at most {sampling.max_tokens}, so that nothing could follow it: "
            "allow more (max_tokens), or shorten it"
        )


def sample_document(
    model: LanguageModel, vocab: VocabLayout, prompt: Sequence[TokenSegment], sampling: Sampling, seed: int
) -> Iterator[tuple[str, Values]]:
    """Yields what the model writes after BOS and a prompt of segments (modality numbers of the vocabulary, local
    ids). A last segment without ids opens a span of its modality, which the model fills; the segment's `grid` is the
    shape of a picture. The values are as `Sampler.span` gives them. Raises UserError as
    `check_prompt`."""
    check_prompt(prompt, sampling, model.diffusion)
    if sampling.guidance != 1.0 and "image" not in vocab.modalities:
        raise UserError(f"guidance={sampling.guidance}: only pictures are guided, and this model has none")
    sampler = Sampler(model, vocab, sampling, seed)
    sampler.read([vocab.specials["bos"]])
    for segment in prompt:
        name = vocab.modalities[segment.modality]
        ids = vocab.ids(name, np.asarray(segment.values, np.int64)).tolist()
        if segment.modality == 0:
            sampler.read(ids)
            continue
        sampler.read([vocab.opening(name, segment.grid)])
        if ids:
            sampler.read(ids, segment.modality)
        else:
            yield name, sampler.span(name, segment.grid)
        sampler.read([vocab.brackets(name)[1]])
    yield from sampler.spans()
