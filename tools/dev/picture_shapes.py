"""Compare ways to tell a model the shape of a picture whose tokens are codes.

    python tools/dev/picture_shapes.py --input 'raw/*.tar' --out shapes.json     # about 20 minutes on one core

    nothing    <boi>, the codes row after row, <eoi>
    opening    <boi_5x12>, the codes, <eoi>                       what `picture_shapes` does
    row ends   <boi>, the codes with a token after each row that ends it, <eoi>
    both       <boi_5x12>, the codes with a token after each row, <eoi>

From each picture a rectangle of random shape is cut, so that all shapes are about equally frequent. Codes are the
nearest of a codebook of 4 x 4 pixels by k-means. The same small Mixture-of-Mamba is trained on the same pictures in the
same order, once for each way and seed; runs that --out has already are not made again. Then it is asked for held-out
losses, and for pictures without any rule about what may follow: is the result a rectangle of the table, and does it
have the shape that was asked for?
"""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from tqdm import tqdm

from mom_data.batches.batch import IGNORE
from mom_data.documents.document import BadSample, expand_inputs, read_documents
from mom_tokenizers.errors import UserError, exit_clearly
from mom_tokenizers.image.autoencoder import fitted
from mom_tokenizers.media.pictures import decode_image
from mom_tokenizers.media.shapes import Grid, Shapes
from mom_tokenizers.vocab import VocabLayout
from mom_train.config.model import ModelConfig
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel, Losses
from mom_train.ops.layout import RowLayout

WAYS = ("nothing", "opening", "row ends", "both")
SHAPES = Shapes(64, 4.0)
SIDE, CODES = 4, 256  # pixels of a code, and size of the codebook
LENGTH = 84  # the longest sequence: 16 rows of 4 codes with their row ends, <bos>, <boi> and <eoi>
MODEL = ModelConfig(dim=96, layers=2, decoupled=("in_proj", "x_proj", "dt_proj", "out_proj"))


def pictures(inputs: list[str], most: int, seed: int) -> Iterator[tuple[Grid, np.ndarray]]:
    """The grid and the pixels (rows, columns, 48) of rectangles that are cut from pictures of the raw files."""
    rng, seen = np.random.default_rng(seed), 0
    for path in expand_inputs(inputs):
        for document in read_documents(path):
            for segment in () if isinstance(document, BadSample) else document.segments:
                if segment.modality != "image" or seen == most:
                    continue
                seen += 1
                assert isinstance(segment.data, bytes)
                image = decode_image(segment.data)
                wanted = np.exp(rng.uniform(-np.log(4), np.log(4)))
                width, height = image.size
                size = (width, min(height, round(width / wanted))) if wanted > width / height else (
                    min(width, round(height * wanted)), height)  # fmt: skip
                size = max(size[0], 1), max(size[1], 1)
                left, top = (
                    int(rng.integers(0, whole - part + 1)) for whole, part in zip(image.size, size, strict=True)
                )
                part = image.crop((left, top, left + size[0], top + size[1]))
                rows, columns = grid = SHAPES.nearest(*size)
                pixels = fitted(part, rows * SIDE, columns * SIDE)
                cells = pixels.reshape(3, rows, SIDE, columns, SIDE).transpose(1, 3, 0, 2, 4)
                yield grid, cells.reshape(rows, columns, -1)


class Way:
    """How pictures are written as tokens. One vocabulary and one size of the model serves all ways."""

    def __init__(self, name: str):
        self.name = name
        self.vocab = VocabLayout({"text": 1, "image": CODES + 1}, shapes=SHAPES)
        self.offset = self.vocab.offsets["image"]
        self.row_end = self.offset + CODES
        self.specials = self.vocab.specials
        self.opens, self.ends_rows = name in ("opening", "both"), name in ("row ends", "both")

    def opening(self, grid: Grid) -> int:
        return self.vocab.openings[grid] if self.opens else self.specials["boi"]

    def tokens(self, codes: np.ndarray) -> np.ndarray:
        """The sequence of one picture, int64 (n,), from its codes (rows, columns)."""
        inside = codes.astype(np.int64) + self.offset
        if self.ends_rows:
            inside = np.concatenate([inside, np.full((len(inside), 1), self.row_end)], 1)
        ends = [self.specials["bos"], self.opening((codes.shape[0], codes.shape[1]))], [self.specials["eoi"]]
        return np.concatenate([ends[0], inside.ravel(), ends[1]])

    def shape(self, inside: list[int]) -> Grid | None:
        """The grid that generated tokens between <boi> and <eoi> have, if they say one; None where they are no
        rectangle. Only `row ends` can say one by itself."""
        lengths, run = [], 0
        for token in inside:
            if token == self.row_end:
                lengths.append(run)
                run = 0
            else:
                run += 1
        return (len(lengths), lengths[0]) if lengths and not run and len(set(lengths)) == 1 else None


def batch_of(way: Way, chosen: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, RowLayout]:
    """(tokens (T,), labels (T,), layout) of one picture a row, in the order of the layout."""
    tokens = np.full((len(chosen), LENGTH), way.specials["pad"], np.int64)
    labels = np.full_like(tokens, IGNORE)
    document = np.ones(tokens.shape, np.int32)
    for row, codes in enumerate(chosen):
        ids = way.tokens(codes)
        tokens[row, : len(ids)], labels[row, : len(ids) - 1], document[row, : len(ids)] = ids, ids[1:], 0
    modality = torch.from_numpy(way.vocab.modality_of_id[tokens])
    layout = RowLayout.sort(modality, torch.from_numpy(document), 2)
    tokens_T, labels_T = (torch.from_numpy(a).reshape(-1)[layout.rows] for a in (tokens, labels))
    return tokens_T, labels_T, layout


def losses(model: LanguageModel, way: Way, held: list[np.ndarray]) -> dict[str, float]:
    """Nats for each code, and for all that describes a picture: its shape, codes, row ends and end."""
    codes = everything = 0.0
    with torch.no_grad():
        for start in range(0, len(held), 64):
            tokens_T, labels_T, layout = batch_of(way, held[start : start + 64])
            found = model(tokens_T, layout, labels_T)
            assert isinstance(found, Losses)
            is_code = (labels_T >= way.offset) & (labels_T < way.row_end)
            codes += float(found.tokens_T[is_code].sum())
            everything += float(found.tokens_T.sum())
    return {"nats_per_code": codes / sum(c.size for c in held), "nats_per_picture": everything / len(held)}


@torch.no_grad()
def drawn(model: LanguageModel, way: Way, grids: list[Grid | None], seed: int) -> list[tuple[Grid | None, list[int]]]:
    """For each asked grid, or None where the model may choose: (the grid that was opened, tokens up to <eoi>). Any
    token may follow any other; a picture that does not end within LENGTH has all its tokens."""
    generator, results = torch.Generator().manual_seed(seed), []
    opened = {token: grid for grid, token in way.vocab.openings.items()}
    for asked in grids:
        state, position = model.empty_state(1), 0

        def read(token: int, state: Any = state) -> torch.Tensor:
            nonlocal position
            layout = RowLayout.sort(
                torch.from_numpy(way.vocab.modality_of_id[[[token]]]), torch.zeros(1, 1, dtype=torch.int32), 2,
                past_B=torch.tensor([position]),
            )  # fmt: skip
            position += 1
            logits, _ = model(torch.tensor([token]), layout, state=state)
            return torch.softmax(logits[0].float(), 0)

        p = read(way.specials["bos"])
        token = way.opening(asked) if asked is not None else int(torch.multinomial(p, 1, generator=generator))
        grid = opened.get(token) if way.opens else None
        inside: list[int] = []
        p = read(token)
        while len(inside) < LENGTH:
            token = int(torch.multinomial(p, 1, generator=generator))
            if token == way.specials["eoi"]:
                break
            inside.append(token)
            p = read(token)
        results.append((grid, inside))
    return results


def judged(way: Way, results: list[tuple[Grid | None, list[int]]]) -> list[Grid | None]:
    """The grid of each generated picture where it is one of the table, otherwise None."""
    found: list[Grid | None] = []
    for opened, inside in results:
        grid = way.shape(inside) if way.ends_rows else opened
        codes = sum(way.offset <= token < way.row_end for token in inside)
        ends = grid[0] if grid is not None and way.ends_rows else 0
        fits = grid in SHAPES.grids and codes + ends == len(inside) and codes == grid[0] * grid[1]
        fits = fits and (not way.opens or grid == opened)
        found.append(grid if fits else None)
    return found


def trained(way: Way, train: list[np.ndarray], steps: int, batch: int, seed: int) -> LanguageModel:
    model = LanguageModel(MODEL, way.vocab.size, 2)
    initialize(model, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    order = np.random.default_rng(seed)
    for _ in tqdm(range(steps), desc=f"{way.name}, seed {seed}", mininterval=10):
        tokens_T, labels_T, layout = batch_of(way, [train[i] for i in order.integers(0, len(train), batch)])
        found = model(tokens_T, layout, labels_T)
        assert isinstance(found, Losses)
        optimizer.zero_grad()
        (found.tokens / (labels_T != IGNORE).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="raw documents with pictures")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    parser.add_argument("--pictures", type=int, default=6000, help="most pictures (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="steps of each run (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=24, help="pictures in a step (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way (default: %(default)s)")
    parser.add_argument("--drawn", type=int, default=68, help="pictures drawn of each kind (default: %(default)s)")
    arguments = parser.parse_args()
    with exit_clearly():
        cut = list(tqdm(pictures(arguments.input, arguments.pictures, 0), desc="pictures", mininterval=10))
        if len(cut) < 500:
            raise UserError(f"--input: {len(cut)} pictures are too few; give at least 500")
        cells = np.concatenate([pixels.reshape(-1, pixels.shape[2]) for _, pixels in cut])
        some = np.random.default_rng(0).permutation(len(cells))[:40_000]
        means = MiniBatchKMeans(CODES, batch_size=4096, n_init=1, random_state=0).fit(cells[some])
        coded = [means.predict(p.reshape(-1, p.shape[2])).reshape(p.shape[:2]) for _, p in cut]
        order = np.random.default_rng(1).permutation(len(coded))
        held, train = [coded[i] for i in order[:400]], [coded[i] for i in order[400:]]
        runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
        for seed in range(arguments.seeds):
            for way in map(Way, WAYS):
                if any((run["way"], run["seed"]) == (way.name, seed) for run in runs):
                    continue
                begun = time.process_time()
                model = trained(way, train, arguments.steps, arguments.batch, seed)
                figures: dict[str, Any] = {"way": way.name, "seed": seed, **losses(model, way, held)}
                free = judged(way, drawn(model, way, [None] * arguments.drawn, seed))
                if way.name != "nothing":  # whose pictures say no shape
                    figures["valid_share"] = float(np.mean([grid is not None for grid in free]))
                if way.opens:
                    asked = [SHAPES.grids[i % len(SHAPES.grids)] for i in range(arguments.drawn)]
                    got = judged(way, drawn(model, way, list(asked), seed))
                    figures["as_asked_share"] = float(np.mean([a == b for a, b in zip(asked, got, strict=True)]))
                runs.append({**figures, "cpu_seconds": round(time.process_time() - begun, 1)})
                print(json.dumps(runs[-1]), flush=True)
                arguments.out.write_text(
                    json.dumps({"train": len(train), "held_out": len(held), "runs": runs}, indent=1)
                )


if __name__ == "__main__":
    main()
