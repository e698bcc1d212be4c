"""Pictures of several shapes, from raw photographs over shards, training and resuming to generated pictures."""

import io
import json
import math
import shutil

import numpy as np
import pytest
import safetensors.numpy
import webdataset
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

from mom_data.batches.batch import assemble_document, build_batch
from mom_data.order.plan import Piece, Source
from mom_data.shards.dataset import TokenDataset, check_agreement
from mom_data.shards.format import ShardWriter, TokenSegment, index_block, write_manifest
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import UserError
from mom_tokenizers.media.shapes import Shapes, cropped_share
from mom_tokenizers.text import TextTokenizer
from mom_tokenizers.vocab import VocabLayout
from tests.helpers.ranks import mom_train, program
from tests.helpers.runs import assert_equal_tensors, metrics, weights
from tests.helpers.tiny_tokenizers import random_vq
from tests.helpers.tokenized import write_tokenizers

RATIOS = {"square": (1, 1), "wide": (2, 1), "tall": (1, 3)}  # width : height
CODES, LATENTS = Shapes(64), Shapes(16, 3)


def photographs():
    """(name, picture) of parts of two photographs, in three aspect ratios, 12 of each."""
    rng, photos = np.random.default_rng(0), load_sample_images().images
    for i in range(12):
        for name, (width, height) in RATIOS.items():
            side = int(rng.integers(40, 120))
            photo = photos[i % 2]
            top, left = (
                int(rng.integers(0, n - m * side + 1)) for n, m in zip(photo.shape, (height, width), strict=False)
            )
            yield f"{name}-{i:02d}", Image.fromarray(photo[top : top + height * side, left : left + width * side])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Raw photographs, tokenizers of codes and of latents with and without shapes, and token shards of each."""
    folder = tmp_path_factory.mktemp("shapes")
    with webdataset.TarWriter(str(folder / "photos.tar"), mtime=0) as tar:
        for name, image in photographs():
            file = io.BytesIO()
            image.save(file, "PNG")
            tar.write({"__key__": name, "txt": f"a {name.partition('-')[0]} picture", "png": file.getvalue()})
    (folder / "latents").mkdir()
    write_tokenizers(folder / "latents")  # 16 pixels, 4 x 4 patches
    (folder / "codes").mkdir()
    random_vq(8).save(folder / "codes/image")  # 8 pixels, 8 x 8 codes
    TextTokenizer.train(["a square wide tall picture"] * 9, 280).save(folder / "codes/text")
    for name, kind, shapes in (("codes", "vq", CODES), ("latents", "kl", LATENTS)):
        entries = {"text": {"kind": "bpe", "path": "text"}, "image": {"kind": kind, "path": "image"}}
        (folder / name / "squares.yaml").write_text(yaml.safe_dump(entries))
        entries["image"]["shapes"] = shapes.as_json()
        (folder / name / "tokenizers.yaml").write_text(yaml.safe_dump(entries))
        for config in ("tokenizers", "squares"):
            given = ("--config", folder / name / f"{config}.yaml", "--input", folder / "photos.tar")
            done = program("mom_tools.data.tokenize_shards", *given, "--output", folder / name / config, "--workers", 1)
            assert done.returncode == 0, done.stderr[-2000:]
    return folder


def picture_of(segments):
    """The picture's segment of a document, before or after its text."""
    return next(segment for segment in segments if segment.modality == 1)


def documents(dataset):
    return [dataset.read(0, d) for d in range(dataset.shards[0]["documents"])]


@pytest.mark.parametrize(("name", "shapes"), [("codes", CODES), ("latents", LATENTS)])
def test_each_photograph_is_stored_with_the_grid_nearest_to_its_shape(made, name, shapes):
    dataset = TokenDataset(made / name / "tokenizers")
    assert dataset.manifest["schema"] == "mom-tokens-2"
    assert dataset.tokenizers["image"]["shapes"] == shapes.as_json()
    image = Tokenizers.load(made / name / "tokenizers.yaml").tokenizer("image")
    seen = set()
    for (key, photo), segments in zip(photographs(), documents(dataset), strict=True):
        picture = picture_of(segments)
        grid = picture.grid or shapes.square
        assert (picture.grid is None) == (key.startswith("square"))
        seen.add(grid)
        # by the share that is cut off, in place of the logarithms
        least = min(cropped_share(*photo.size, other) for other in shapes.grids)
        assert cropped_share(*photo.size, grid) == pytest.approx(least)
        assert len(picture.values) == math.prod(grid)
        alone = image.encode(photo)
        assert alone.shape[:2] == grid
        # one picture alone may round differently from several in a batch
        np.testing.assert_allclose(
            alone.reshape(picture.values.shape), picture.values, atol=0.02 if name == "latents" else 0
        )
        decoded = image.decode(picture.shaped)
        assert decoded.size == (grid[1] * image.pixels_of((1, 1))[1], grid[0] * image.pixels_of((1, 1))[0])
    assert len(seen) == 3
    for wrong in ((1, 9), (7, 2)):
        with pytest.raises(UserError, match=f"{wrong[0]} rows of {wrong[1]} columns given, and this tokenizer makes"):
            image.decode(np.zeros((*wrong, *alone.shape[2:])))


@pytest.mark.parametrize("name", ["codes", "latents"])
def test_without_shapes_pictures_are_square_as_before(made, name):
    squares, shaped = (TokenDataset(made / name / kind) for kind in ("squares", "tokenizers"))
    assert squares.manifest["schema"] == "mom-tokens-1"
    assert squares.index(0).segment_grid is None
    for (key, _), before, after in zip(photographs(), documents(squares), documents(shaped), strict=True):
        assert picture_of(before).grid is None
        if key.startswith("square"):
            np.testing.assert_allclose(
                picture_of(before).values, picture_of(after).values, atol=0.02 if name == "latents" else 0
            )


def test_a_dataset_of_square_pictures_alone_has_the_same_bytes_whether_shapes_are_allowed_or_not(tmp_path):
    described = {
        "text": {"kind": "bpe", "fingerprint": "a", "size": 9},
        "image": {"kind": "vq", "fingerprint": "b", "size": 9},
    }
    for name, values in (("plain", np.zeros(64, np.uint16)), ("grid", np.zeros((8, 8), np.uint16))):
        with ShardWriter(tmp_path / f"{name}.tar", list(described)) as writer:
            writer.add("a", [TokenSegment.of(1, values)])
    for ending in ("tar", "idx"):
        assert (tmp_path / f"plain.{ending}").read_bytes() == (tmp_path / f"grid.{ending}").read_bytes()


@pytest.mark.parametrize(("name", "shapes"), [("codes", CODES), ("latents", LATENTS)])
def test_a_batch_opens_each_picture_with_the_token_of_its_shape(made, name, shapes):
    dataset = TokenDataset(made / name / "tokenizers")
    sizes = {m: t["size"] for m, t in dataset.tokenizers.items()}
    plain, vocab = VocabLayout(sizes), VocabLayout(sizes, shapes=shapes)
    assert {n: vocab.specials[n] for n in plain.specials} == plain.specials
    assert len(vocab.specials) - len(plain.specials) == len(shapes.grids) - 1
    for d, segments in enumerate(documents(dataset)):
        index = dataset.index(0).segments(d)
        length = 2 + sum(n + 2 * (m > 0) for n, m in zip(*index[:2], strict=True))
        batch = build_batch([[Piece(0, 0, d, 0, length)]], [Source(dataset, 1.0)], vocab, length, [0])
        ids, routes, _ = assemble_document(segments, dataset.modalities, vocab)
        np.testing.assert_array_equal(batch.tokens[0].numpy(), ids)
        np.testing.assert_array_equal(batch.modality[0].numpy(), routes)
        opened = ids[int(routes.argmax()) - 1]
        grid = picture_of(segments).grid
        assert opened == vocab.specials["boi" if grid is None else "boi_{}x{}".format(*grid)]
    with pytest.raises(UserError, match="set picture_shapes"):
        build_batch([[Piece(0, 0, 0, 0, length)]], [Source(dataset, 1.0)], plain, length, [0])
    check_agreement([dataset], sizes, shapes=shapes)
    for other in (None, Shapes(shapes.tokens, 1.5)):
        with pytest.raises(UserError, match=r"holds pictures of several shapes .* set picture_shapes"):
            check_agreement([dataset], sizes, shapes=other)


def config_of(made, name, shapes, folder):
    described = Tokenizers.load(made / name / "tokenizers.yaml").describe()
    values = {
        "run_dir": str(folder / "run"),
        "vocabulary": {m: d["size"] for m, d in described.items()},
        "picture_shapes": shapes.as_json(),
        "tokenizers": str(made / name / "tokenizers.yaml"),
        "model": {"dim": 32, "layers": 1, "decoupled": ["in_proj", "out_proj"]},
        "data": {"train": [{"path": str(made / name / "tokenizers")}, {"path": str(made / name / "squares")}],
                 "validation": {"held": [{"path": str(made / name / "tokenizers")}]},
                 "sequence_length": 128, "lanes": 1, "workers": 0},
        "optimizer": {"learning_rate": 0.01, "warmup": 1},
        "training": {"steps": 4, "batch": 2, "micro_batch": 2},
        "validation": {"sequences": 2},
        "sampling": {"every": 4, "max_tokens": 80, "denoising_steps": 2,
                     "prompts": [{"text": "a wide picture", "start": "image", "shape": "2:1"}]},
    }  # fmt: skip
    if name == "latents":
        values["objective"] = {"diffusion": {"patch_width": described["image"]["patch_width"]}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.mark.parametrize(("name", "shapes"), [("codes", CODES), ("latents", LATENTS)])
def test_a_run_trains_resumes_bit_for_bit_and_draws_the_shapes_that_are_asked_for(made, name, shapes, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed").mkdir()
    whole, resumed = (config_of(made, name, shapes, tmp_path / kind) for kind in ("whole", "resumed"))
    for config, overrides in ((whole, []), (resumed, ["training.stop_at=2"]), (resumed, [])):
        code, said = mom_train(config, *overrides)
        assert code == 0, said[-3000:]
    assert_equal_tensors(weights(tmp_path / "whole/run"), weights(tmp_path / "resumed/run"))
    assert metrics(tmp_path / "whole/run")[-1] == metrics(tmp_path / "resumed/run")[-1]
    code, said = mom_train(resumed, "training.steps=5", "picture_shapes.max_aspect_ratio=2")
    assert code == 2
    assert "picture_shapes" in said

    rows, columns = shapes.asked_for("2:1")
    side = 1 if name == "codes" else 4  # pixels of a token
    drawn = Image.open(next((tmp_path / "whole/run/samples/step-4").glob("0-0.png")))
    assert drawn.size == (columns * side, rows * side)
    asked = ("2:1", "1:1", "x".join(map(str, shapes.grids[0])))
    options = ("--shape", *asked, "--out", tmp_path / "drawn", "--max-tokens", 4, "--denoising-steps", 2)
    done = program("mom_tools.model.generate", tmp_path / "whole/run", *options, "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    for n, shape in enumerate(asked):
        rows, columns = shapes.asked_for(shape)
        assert Image.open(tmp_path / f"drawn/sample-{n}-0.png").size == (columns * side, rows * side)
    if name == "codes":
        written = json.loads((tmp_path / "drawn/sample-0-0.json").read_text())
        assert (written["rows"], written["columns"]) == shapes.asked_for("2:1")
        assert len(written["ids"]) == math.prod(shapes.asked_for("2:1"))
    done = program("mom_tools.model.generate", tmp_path / "whole/run", "--shape", "9:1", "--device", "cpu")
    assert done.returncode == 2
    assert "no side may be more than" in done.stderr


def test_the_inspector_shows_the_pictures_in_their_shapes(made, tmp_path):
    options = ("--output", tmp_path / "page.html", "--tokenizers", made / "codes/tokenizers.yaml", "--documents", 6)
    done = program("mom_tools.data.inspect_shards", made / "codes/tokenizers", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "page.html").read_text()
    assert any(f"{rows * columns} codes, {rows} rows of {columns}" in page for rows, columns in ((5, 11), (13, 4)))
    assert "not decoded" not in page


def test_a_sound_dataset_is_verified_and_a_grid_that_does_not_fit_is_named(made, tmp_path):
    shutil.copytree(made / "codes/tokenizers", tmp_path / "d")
    assert program("mom_tools.data.verify_shards", tmp_path / "d").returncode == 0
    index = tmp_path / "d/photos-00000.idx"
    index.unlink()
    assert program("mom_tools.data.verify_shards", tmp_path / "d", "--rebuild-index").returncode == 0
    assert index.read_bytes() == (made / "codes/tokenizers/photos-00000.idx").read_bytes()

    with webdataset.WebDataset(str(tmp_path / "d/photos-00000.tar"), shardshuffle=False) as samples:
        arrays = safetensors.numpy.load(next(iter(samples))["safetensors"])
    at = int(arrays["grids"][:, 0].argmax())
    for grid, message in (((3, 5), "its grid is 3 rows of 5 columns"), ((-1, 5), "does not fit its segments")):
        arrays["grids"][at] = grid
        with pytest.raises(ValueError, match=message):
            index_block(safetensors.numpy.save(arrays), 0)

    def damaged(change):
        """A dataset of one picture of 6 x 10 codes whose index was changed before its checksum was taken."""
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        (tmp_path / "bad").mkdir()
        with ShardWriter(tmp_path / "bad/a.tar", ("text", "image")) as writer:
            writer.add("a", [TokenSegment(1, np.zeros(60, np.uint16), (6, 10))])
        file = tmp_path / "bad/a.idx"
        arrays = safetensors.numpy.load(file.read_bytes())
        arrays["segment_grid"] = np.array([change], np.uint16)
        file.write_bytes(safetensors.numpy.save(arrays))
        described = {m: {"kind": "test", "fingerprint": m, "size": 16} for m in ("text", "image")}
        described["image"]["shapes"] = CODES.as_json()
        write_manifest(tmp_path / "bad", [writer.record()], described, np.uint16, {})
        return TokenDataset(tmp_path / "bad")

    assert damaged((6, 10)).read(0, 0)[0].grid == (6, 10)
    for grid, message in (
        ((6, 9), "60 tokens, and its grid is 6 rows of 9 columns"),
        ((2, 30), "2 rows of 30 columns, wh"),
    ):
        with pytest.raises(UserError, match=message):
            damaged(grid).index(0)
    with ShardWriter(tmp_path / "w.tar", ("text", "image")) as writer:
        for modality, grid in ((1, (6, 9)), (1, (0, 0)), (0, (6, 10))):
            with pytest.raises(ValueError, match="rows of"):
                writer.add("a", [TokenSegment(modality, np.zeros(60, np.uint16), grid)])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "janus", "path": "image", "shapes": {"tokens": 64}}, "kind janus. makes square pictures only"),
        ({"kind": "vq", "path": "image", "shapes": {"tokens": 60}}, "'image': shapes: tokens must be"),
        ({"kind": "vq", "path": "image", "shape": {"tokens": 64}}, "may also have shapes"),
        (
            {"kind": "units", "path": "image", "shapes": {"tokens": 64}},
            "only pictures have them|which only pictures have",
        ),
    ],
)
def test_shapes_that_a_tokenizer_cannot_have_are_one_clear_message(made, tmp_path, entry, message):
    path = made / "codes" / "wrong.yaml"
    path.write_text(yaml.safe_dump({"text": {"kind": "bpe", "path": "text"}, "image": entry}))
    with pytest.raises(UserError, match=message):
        Tokenizers.load(path)


def test_shapes_of_a_modality_that_no_opening_token_could_tell_are_refused(made):
    path = made / "codes" / "photo.yaml"
    photo = {"kind": "vq", "path": "image", "shapes": {"tokens": 64}}
    path.write_text(yaml.safe_dump({"text": {"kind": "bpe", "path": "text"}, "photo": photo}))
    with pytest.raises(UserError, match="'photo' has shapes, which only the modality 'image' can have"):
        Tokenizers.load(path)


def test_another_budget_than_the_tokenizers_own_names_both(made):
    path = made / "codes" / "other.yaml"
    image = {"kind": "vq", "path": "image", "shapes": {"tokens": 16}}
    path.write_text(yaml.safe_dump({"text": {"kind": "bpe", "path": "text"}, "image": image}))
    tokenizers = Tokenizers.load(path)
    for _ in range(2):  # the second time as well: nothing half made is kept
        with pytest.raises(UserError, match=r"tokens is 16, but this tokenizer makes 64 .* set tokens to 64"):
            tokenizers.tokenizer("image")
