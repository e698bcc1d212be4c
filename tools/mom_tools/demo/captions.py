"""Measures whether captions decide what the demo's model draws.

The model draws pictures for captions of digits and of emoji. A small classifier, trained on scikit-learn's digits, says
which digit it sees, and the colour nearest to the picture's border says on which ground it was drawn. Beside the share
that is right stand chance, and the share that is right for real pictures after the image tokenizer, which is what a
perfect model would reach.

The model is also asked without drawing: after which of the ten captions is a real digit, which it was not trained on,
likeliest? A model learns this sooner than to draw.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import stats

from mom_data.shards.format import TokenSegment
from mom_tokenizers.bundle import Tokenizers
from mom_tools.demo.corpus import WORDS, named_emoji, split_digits
from mom_tools.demo.render import GROUNDS, PENS, emoji_png, png
from mom_tools.output import markdown_table
from mom_train.checkpoint.load import load_run
from mom_train.config.run import RunConfig
from mom_train.config.sampling import PromptConfig
from mom_train.distributed.ranks import process_group
from mom_train.generate.sampler import sample_document
from mom_train.generate.samples import prompt_segments, settings
from mom_train.model.language_model import LanguageModel
from mom_train.passes import Passes
from mom_train.validation.likelihood import Likelihood, Question

DIGIT_CAPTION = "A handwritten digit, in black ink: {word}."
EMOJI_CAPTION = "{Name}, on a {ground} ground."
_ROOM = 700  # positions for a caption and its picture
_SIDE, _GAP = 32, 2


@dataclass(frozen=True)
class Hits:
    """How many pictures show what their caption says, or belong to the caption that the model finds."""

    what: str
    right: int
    pictures: int
    real_right: int | None
    """The same number for as many real pictures that went through the image tokenizer. None where the pictures are real
    ones."""
    choices: int

    @property
    def p_value(self) -> float:
        """The probability of at least as many hits by chance."""
        return float(stats.binomtest(self.right, self.pictures, 1 / self.choices, "greater").pvalue)


def ink_8x8(picture: Image.Image) -> np.ndarray:
    """The amount of ink of a digit on a plain ground, (64,), from 0 to 16 as in scikit-learn's digits."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    away = np.abs(pixels - np.median(pixels[[0, -1]].reshape(-1, 3), 0)).sum(2)
    grey = Image.fromarray((255 * away / max(float(away.max()), 1.0)).astype(np.uint8))
    return np.asarray(grey.resize((8, 8), Image.Resampling.BOX), np.float32).ravel() / 255 * 16


def ground_of(picture: Image.Image) -> str:
    """The name of the ground whose colour is nearest to that of the picture's border."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    border = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), 0)
    return min(GROUNDS, key=lambda name: float(np.square(border - GROUNDS[name]).sum()))


def digit_reader() -> tuple[Callable[[Image.Image], int], np.ndarray, np.ndarray]:
    """(a function that says which digit a picture shows, the digits (n, 8, 8) that it was not trained on, their
    numbers). It is trained on pictures as the corpus draws them."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    digits = load_digits()
    black = next(iter(PENS))
    seen = [ink_8x8(_opened(png(pixels, black))) for pixels in digits.images]
    half = len(seen) // 2
    known = SVC(gamma=0.001).fit(seen[:half], digits.target[:half])
    return (lambda picture: int(known.predict([ink_8x8(picture)])[0])), digits.images[half:], digits.target[half:]


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def measure(run: Path, each: int = 3) -> tuple[list[Hits], Image.Image] | None:
    """Draw `each` pictures for every digit and every ground. Returns the hits, and all pictures in a grid whose rows
    are digits and grounds. None where the run has no pictures or text."""
    model, config = load_run(run)
    vocab = config.layout
    if config.tokenizers is None or not {"text", "image"} <= set(vocab.modalities):
        return None
    tokenizers = Tokenizers.load(config.tokenizers)
    sampling = settings(tokenizers, max_tokens=_ROOM)
    image = tokenizers.tokenizer("image")

    def draw(caption: str, seed: int) -> Image.Image:
        prompt = prompt_segments(PromptConfig(text=caption, start="image"), tokenizers, vocab)
        values = next(v for m, v in sample_document(model, vocab, prompt, sampling, seed) if m == "image")
        decoded: Any = image.decode(np.asarray(values))
        return decoded

    def kept(data: bytes) -> Image.Image:
        decoded: Any = image.decode(image.encode(_opened(data)))
        return decoded

    read, images, targets = digit_reader()
    rows: list[list[Image.Image]] = []
    right = real = 0
    for digit, word in enumerate(WORDS[:10]):
        rows.append([draw(DIGIT_CAPTION.format(word=word), k) for k in range(each)])
        right += sum(read(p) == digit for p in rows[-1])
        examples = images[targets == digit][:each]
        real += sum(read(kept(png(pixels, next(iter(PENS))))) == digit for pixels in examples)
    hits = [Hits("digit that is drawn", right, 10 * each, real, 10)]
    if emoji := named_emoji():
        right = real = 0
        chosen = [emoji[(2 * k + 1) * len(emoji) // (2 * each)] for k in range(each)]
        for ground in GROUNDS:
            captions = [EMOJI_CAPTION.format(Name=name.capitalize(), ground=ground) for _, name in chosen]
            rows.append([draw(caption, k) for k, caption in enumerate(captions)])
            right += sum(ground_of(p) == ground for p in rows[-1])
            real += sum(ground_of(kept(emoji_png(file, ground))) == ground for file, _ in chosen)
        hits.append(Hits("ground of an emoji that is drawn", right, len(GROUNDS) * each, real, len(GROUNDS)))
    hits.append(told_apart(model, config, tokenizers))
    return hits, contact_sheet(rows)


def told_apart(model: LanguageModel, config: RunConfig, tokenizers: Tokenizers) -> Hits:
    """For how many digits that the demo's corpus holds out is the caption that names them the one of ten captions after
    which the model finds them likeliest."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    held_out, _ = split_digits(len(digits.images))
    image, number = tokenizers.tokenizer("image"), config.layout.modalities.index("image")
    black = next(iter(PENS))
    values = [np.asarray(image.encode(_opened(png(digits.images[i], black)))) for i in held_out]
    pictures = tuple(TokenSegment(number, v) for v in values)
    captions = [tokenizers.encode("text", DIGIT_CAPTION.format(word=word)) for word in WORDS[:10]]
    with process_group() as ranks:
        likelihood = Likelihood(Passes(config, config.layout, ranks, model), config.evaluation.draws)
        scores = likelihood.score([Question((TokenSegment(0, ids),), pictures) for ids in captions])
    assert scores is not None, "nothing interrupts it"
    right = int((np.stack(scores).argmax(0) == digits.target[held_out]).sum())
    return Hits("digit, by likelihood alone", right, len(pictures), None, 10)


def contact_sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """The pictures in columns, one column for each row of `rows`, so that the sheet is wide."""
    step = _SIDE + _GAP
    sheet = Image.new("RGB", (step * len(rows) + _GAP, step * max(map(len, rows)) + _GAP), (128, 128, 128))
    for column, pictures in enumerate(rows):
        for row, picture in enumerate(pictures):
            sheet.paste(picture.resize((_SIDE, _SIDE)), (_GAP + step * column, _GAP + step * row))
    return sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST)


def table(hits: Sequence[Hits]) -> str:
    """The hits as a Markdown table."""
    head = ["what the caption decides", "right", "by chance", "real pictures, tokenized", "p"]
    rows = []
    for h in hits:
        chance = f"{h.pictures / h.choices:.0f}"
        real = "" if h.real_right is None else f"{h.real_right} of {h.pictures}"
        rows.append([h.what, f"{h.right} of {h.pictures}", chance, real, f"{h.p_value:.1g}"])
    return markdown_table(head, rows)
