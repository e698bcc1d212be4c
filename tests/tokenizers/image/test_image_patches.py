import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import UserError
from mom_tokenizers.image.autoencoder import preprocess
from mom_tokenizers.image.patch_network import PatchAutoencoder
from mom_tokenizers.image.patches import PatchImageTokenizer

CODES = 48


def tiny(resolution=16, patch=4):
    """A tokenizer with random entries and a decoder's network that changes a lot."""
    torch.manual_seed(0)
    model = PatchAutoencoder(patch, CODES, 8, 1)
    model.codebook.copy_(torch.randint(0, 256, model.codebook.shape))
    torch.nn.init.normal_(model.last.weight)
    torch.nn.init.normal_(model.middle[0].conv2.weight, std=0.3)
    return PatchImageTokenizer(model, resolution)


def picture(seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((40, 30), Image.Resampling.BICUBIC)


def test_codes_are_the_nearest_entries_by_a_search_in_whole_numbers():
    tokenizer = tiny()
    codes = tokenizer.encode(picture())
    pixels = ((preprocess(picture(), 16).astype(np.float64) + 1) * 127.5).round().astype(int)  # (3, 16, 16)
    codebook = tokenizer._model.codebook.numpy().astype(int).reshape(CODES, 3, 4, 4)
    for row in range(4):
        for column in range(4):
            square = pixels[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            distances = ((codebook - square) ** 2).sum((1, 2, 3))
            assert codes[4 * row + column] == distances.argmin()
    assert len(set(codes.tolist())) > 4


def test_a_batch_gives_the_codes_of_one_by_one_exactly():
    tokenizer = tiny()
    pictures = [picture(seed) for seed in range(40)]
    alone = np.stack([tokenizer.encode(p) for p in pictures])
    np.testing.assert_array_equal(np.stack(tokenizer.encode_batch(pictures)), alone)


def test_of_two_entries_at_the_same_distance_the_first_is_taken():
    model = PatchAutoencoder(1, 3, 8, 0)
    model.codebook.copy_(torch.tensor([[200, 0, 0], [10, 0, 0], [14, 0, 0]]))
    assert model.nearest(torch.tensor([[12.0, 0, 0]])).tolist() == [1]


@torch.inference_mode()
def test_whatever_the_network_adds_a_decoded_picture_of_any_shape_has_its_codes():
    tokenizer = tiny()
    codes = torch.randint(0, CODES, (5, 3, 7), generator=torch.Generator().manual_seed(1))
    decoded = tokenizer.reconstruct(codes)
    assert decoded.shape == (5, 3, 12, 28)
    stored = ((decoded + 1) * 127.5).round().to(torch.uint8)  # as a PNG would hold it
    again = tokenizer.quantize(stored.float() / 127.5 - 1)
    assert torch.equal(again.view(5, 3, 7), codes)
    # and yet the network has changed most squares
    plain = tokenizer._model.codebook[codes.flatten()].double()
    found = tokenizer._model.squares(stored.double()).flatten(0, 1)
    assert ((found - plain).abs().amax(1) > 2).double().mean() > 0.5


@torch.inference_mode()
def test_the_decoder_adds_its_correction_in_full_where_that_stays_in_the_cell():
    model = PatchAutoencoder(1, 2, 8, 0)
    model.codebook.copy_(torch.tensor([[40, 40, 40], [200, 200, 200]]))
    model.last.bias.copy_(torch.tensor([10.0, -5.0, 0.0]) / 128)
    pixels = (model.decode(torch.tensor([[[0, 1]]])) + 1) * 127.5
    torch.testing.assert_close(pixels[0, :, 0].T, torch.tensor([[50.0, 35, 40], [210, 195, 200]]))
    # towards the other entry it goes to just before the middle, which is 120
    model.last.bias.copy_(torch.tensor([150.0, 150, 150]) / 128)
    pixels = (model.decode(torch.tensor([[[0, 0]]])) + 1) * 127.5
    assert 115 < float(pixels[0, 0, 0, 0]) < 120


def test_saved_tokenizers_load_as_kind_patches_and_keep_codes_pictures_and_fingerprint(tmp_path):
    tokenizer = tiny()
    tokenizer.save(tmp_path / "image")
    (tmp_path / "words").mkdir()
    (tmp_path / "t.yaml").write_text("text: {kind: bpe, path: words}\nimage: {kind: patches, path: image}")
    bundle = Tokenizers.load(tmp_path / "t.yaml")
    loaded = bundle.tokenizer("image")
    loaded.save(tmp_path / "again")
    again = PatchImageTokenizer.load(tmp_path / "again")
    assert tokenizer.fingerprint() == loaded.fingerprint() == again.fingerprint()
    assert loaded.size == PatchImageTokenizer.stored_size(tmp_path / "image") == CODES
    file = io.BytesIO()
    picture().save(file, "PNG")
    codes = bundle.encode("image", file.getvalue())
    np.testing.assert_array_equal(codes, tokenizer.encode(picture()))
    assert codes.dtype == np.uint32
    assert loaded.decode(codes).tobytes() == tokenizer.decode(codes).tobytes()
    assert tiny(32).fingerprint() != tokenizer.fingerprint()


def test_folders_that_hold_something_else_are_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny().save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())

    def refused(match, changed=None, **config):
        save_file(weights if changed is None else changed, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(settings | config))
        with pytest.raises(UserError, match=match):
            PatchImageTokenizer.load(tmp_path)

    refused("not the config of a tokenizer of kind patches", model="VQModel")
    refused("must be whole numbers", patch="4")
    refused("weights are not those of the config", size=CODES + 1)
    refused("weights are not those of the config", {k: v for k, v in weights.items() if k != "codebook"})
    refused("two entries of the codebook are the same", weights | {"codebook": weights["codebook"] * 0})
    refused("uint8", weights | {"codebook": weights["codebook"].float()})
    with pytest.raises(ValueError, match="no multiple of the model's factor 4"):
        tiny(18)
