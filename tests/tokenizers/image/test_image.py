import io

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image

from mom_tokenizers.errors import UserError
from mom_tokenizers.image.autoencoder import VQImageTokenizer, preprocess


def tiny_model(**changes):
    torch.manual_seed(0)
    settings = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "vq_embed_dim": 4,
        "num_vq_embeddings": 32,
        "norm_num_groups": 2,
    }
    model = VQModel(**{**settings, **changes}).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def picture(width=40, height=30, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("norm", ["group", "spatial"])
def test_encode_then_decode_equals_the_models_own_forward(lookup, norm):
    # diffusers' spatial norm wants channels by 32
    settings = {"norm_type": norm, "block_out_channels": (32, 32)}
    tokenizer = VQImageTokenizer(tiny_model(**settings, lookup_from_codebook=lookup), 16)
    codes = tokenizer.encode(picture())
    assert codes.shape == (64,)
    assert codes.dtype == np.uint32
    assert len(set(codes.tolist())) > 2
    own = tiny_model(**settings)  # the same weights, and a forward pass that quantises
    with torch.inference_mode():
        forward = own(torch.from_numpy(preprocess(picture(), 16))[None]).sample[0]
    expected = ((forward.clamp(-1, 1) + 1) * 127.5).round().numpy().transpose(1, 2, 0)
    assert np.abs(np.asarray(tokenizer.decode(codes), np.float32) - expected).max() <= 1


def test_codes_are_the_nearest_vectors_in_raster_order():
    tokenizer = VQImageTokenizer(tiny_model(), 16)
    codes = tokenizer.encode(picture())
    model = tiny_model()
    with torch.inference_mode():
        latents = model.encode(torch.from_numpy(preprocess(picture(), 16))[None]).latents[0].numpy()
    codebook = model.quantize.embedding.weight.detach().numpy()
    for row, column in [(0, 0), (0, 7), (3, 5), (7, 0), (7, 7)]:
        distances = ((codebook - latents[:, row, column]) ** 2).sum(axis=1)
        assert codes[8 * row + column] == distances.argmin()


def test_batch_gives_the_codes_of_one_by_one():
    tokenizer = VQImageTokenizer(tiny_model(), 16)
    pictures = [picture(seed=i) for i in range(40)]
    agreement = np.mean(np.stack(tokenizer.encode_batch(pictures)) == np.stack([tokenizer.encode(p) for p in pictures]))
    assert agreement > 0.999


def test_preprocess_crops_the_centre_of_the_resized_short_side():
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("blue", (30, 0, 60, 30))
    pixels = preprocess(wide, 30)
    assert pixels.shape == (3, 30, 30)
    np.testing.assert_allclose(pixels[:, :, 1:-1].mean(axis=(1, 2)), [-1, -1, 1], atol=1e-6)
    # independent: resize the whole, then crop
    resized = picture(60, 40).resize((24, 16), Image.Resampling.LANCZOS).crop((4, 0, 20, 16))
    expected = np.asarray(resized, np.float32).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(preprocess(picture(60, 40), 16) - expected).max() <= 1.01 / 127.5


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("RGBA", (20, 20), (0, 0, 0, 0)), 1.0),
        (Image.new("LA", (20, 20), (0, 255)), -1.0),
        (Image.new("L", (20, 20), 255), 1.0),
        (Image.new("CMYK", (20, 20), (0, 0, 0, 0)), 1.0),
        (Image.new("P", (20, 20)), -1.0),
        (Image.new("1", (20, 20), 1), 1.0),
        (Image.fromarray(np.full((20, 20), 65535, np.uint16)), 1.0),
    ],
)
def test_every_picture_mode_becomes_rgb_on_white(image, colour):
    np.testing.assert_allclose(preprocess(image, 16), np.full((3, 16, 16), colour), atol=1e-6)


@pytest.mark.parametrize("size", [(1, 500), (3000, 2), (1, 1)])
def test_extreme_shapes_are_cropped_not_refused(size):
    assert preprocess(Image.new("RGB", size, "white"), 16).shape == (3, 16, 16)


def test_save_and_load_keep_codes_and_fingerprint(tmp_path):
    tokenizer = VQImageTokenizer(tiny_model(), 16)
    tokenizer.save(tmp_path / "a")
    loaded = VQImageTokenizer.load(tmp_path / "a")
    np.testing.assert_array_equal(loaded.encode(picture()), tokenizer.encode(picture()))
    loaded.save(tmp_path / "b")
    again = VQImageTokenizer.load(tmp_path / "b")
    assert tokenizer.fingerprint() == loaded.fingerprint() == again.fingerprint()
    assert VQImageTokenizer.stored_size(tmp_path / "b") == again.size == 32
    assert VQImageTokenizer(tiny_model(), 32).fingerprint() != tokenizer.fingerprint()


def test_a_pickled_checkpoint_is_never_loaded(tmp_path):
    VQImageTokenizer(tiny_model(), 16).save(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    torch.save(tiny_model().state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match="safetensors"):
        VQImageTokenizer.load(tmp_path)


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    VQImageTokenizer(tiny_model(), 16).save(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    kept = {k: v for k, v in load_file(weights).items() if not k.startswith("quantize")}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors.*quantize"):
        VQImageTokenizer.load(tmp_path)
    deeper = load_file(weights) | {"encoder.down_blocks.7.resnets.0.norm1.weight": torch.ones(4)}
    deeper["quantize.embedding.weight"] = tiny_model().quantize.embedding.weight.detach()
    save_file(deeper, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"hold 1 tensors .* no place for, e.g. encoder.down_blocks.7"):
        VQImageTokenizer.load(tmp_path)


def test_wrong_codes_and_resolutions_are_refused(tmp_path):
    tokenizer = VQImageTokenizer(tiny_model(), 16)
    with pytest.raises(ValueError, match="a picture has 64"):
        tokenizer.decode([1, 2])
    with pytest.raises(ValueError, match="codebook of 32"):
        tokenizer.decode([32] * 64)
    with pytest.raises(ValueError, match="factor 2"):
        VQImageTokenizer(tiny_model(), 17)
    with pytest.raises(ValueError, match=r"config\.json"):
        VQImageTokenizer.load(tmp_path)
