import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.image.autoencoder import preprocess
from mom_tokenizers.image.kl import KLImageTokenizer, patchify, unpatchify


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 3,
        "norm_num_groups": 2,
        "scaling_factor": 0.7,
        "shift_factor": 0.1,
    }
    model: Any = AutoencoderKL(**{**settings, **changes})
    return model.eval()


def picture(width=40, height=30, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@torch.inference_mode()
def latents_of(model, image, resolution=16):
    """The latents by diffusers' own model, float32 (1, C, H, W)."""
    return model.encode(torch.from_numpy(preprocess(image, resolution))[None]).latent_dist.mode()


def test_patches_are_the_means_of_diffusers_own_encode_in_float16():
    tokenizer = KLImageTokenizer(tiny_model(), 16)
    patches = tokenizer.encode(picture())
    assert patches.shape == (tokenizer.patches_per_image, tokenizer.patch_width) == (16, 12)
    assert patches.dtype == np.float16
    latents = latents_of(tiny_model(), picture())[0].numpy()
    # by hand: patch (row, column), then channel, then the place inside
    for row, column in [(0, 0), (0, 3), (2, 1), (3, 3)]:
        for c in range(3):
            for p in range(2):
                for q in range(2):
                    exact = latents[c, 2 * row + p, 2 * column + q]
                    stored = patches[4 * row + column, 4 * c + 2 * p + q]
                    assert abs(stored - exact) <= 2**-11 * abs(exact) + 2**-24  # rounding to the nearest float16


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_convolution_of_the_latents_is_a_linear_map_of_the_patches(patch):
    torch.manual_seed(1)
    latents = torch.randn(2, 3, 8, 8)
    conv: Any = torch.nn.Conv2d(3, 5, patch, stride=patch)
    with torch.inference_mode():
        expected = conv(latents).flatten(2).transpose(1, 2)
        patches = torch.from_numpy(patchify(latents.numpy(), patch))
        found = patches @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(found, expected)
    assert np.array_equal(unpatchify(patches.numpy(), patch, 8 // patch, 8 // patch), latents.numpy())


def test_patches_of_a_wide_picture_come_back_to_their_places():
    latents = np.random.default_rng(0).standard_normal((2, 3, 4, 12)).astype(np.float32)
    patches = patchify(latents, 2)
    assert patches.shape == (2, 2 * 6, 12)
    np.testing.assert_array_equal(patches[1, 6 * 1 + 4].reshape(3, 2, 2), latents[1, :, 2:4, 8:10])
    assert np.array_equal(unpatchify(patches, 2, rows=2, cols=6), latents)


def test_decode_is_diffusers_own_decode_of_the_latents():
    tokenizer = KLImageTokenizer(tiny_model(), 16)
    decoded = np.asarray(tokenizer.decode(tokenizer.encode(picture())), np.float32)
    model = tiny_model()
    with torch.inference_mode():
        own = model.decode(latents_of(model, picture())).sample[0]
    expected = ((own.clamp(-1, 1) + 1) * 127.5).numpy().transpose(1, 2, 0)
    assert expected.std() > 1, "the random decoder must give something to compare"
    assert np.abs(decoded - expected).max() <= 0.75  # half a step of rounding, and what float16 moved


def test_a_batch_gives_the_patches_of_one_by_one():
    tokenizer = KLImageTokenizer(tiny_model(), 16)
    pictures = [picture(seed=i) for i in range(40)]
    together = np.stack(tokenizer.encode_batch(pictures)).astype(np.float32)
    alone = np.stack([tokenizer.encode(p) for p in pictures]).astype(np.float32)
    # sums in another order may round to the neighbouring float16
    np.testing.assert_allclose(together, alone, rtol=2**-10, atol=1e-5)


def test_save_and_load_keep_patches_and_fingerprint(tmp_path):
    tokenizer = KLImageTokenizer(tiny_model(), 16, patch=4)
    tokenizer.save(tmp_path / "a")
    loaded = KLImageTokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    again = KLImageTokenizer.load(tmp_path / "b")
    assert np.array_equal(again.encode(picture()), tokenizer.encode(picture()))
    assert (again.patch, again.patches_per_image, again.patch_width, again.size) == (4, 4, 48, 1)
    assert tokenizer.fingerprint() == loaded.fingerprint() == again.fingerprint()
    assert KLImageTokenizer(tiny_model(), 16, patch=2).fingerprint() != tokenizer.fingerprint()
    assert KLImageTokenizer(tiny_model(scaling_factor=0.6), 16, patch=4).fingerprint() != tokenizer.fingerprint()


def test_the_bundle_describes_and_encodes_it(tmp_path):
    tokenizer = KLImageTokenizer(tiny_model(), 16)
    tokenizer.save(tmp_path / "image")
    (tmp_path / "text").mkdir()
    (tmp_path / "tokenizers.yaml").write_text("text: {kind: bpe, path: text}\nimage: {kind: kl, path: image}\n")
    bundle = Tokenizers.load(tmp_path / "tokenizers.yaml")
    described = Tokenizers((bundle.entries[1],)).describe()
    assert described == {
        "image": {
            "kind": "kl",
            "fingerprint": tokenizer.fingerprint(),
            "size": 1,
            "patch_width": 12,
            "latent_scale": 0.7,
            "latent_shift": 0.1,
        }
    }
    assert json.loads(json.dumps(described)) == described
    files = []
    for i in range(3):
        picture(seed=i).save(tmp_path / "p.png")
        files.append((tmp_path / "p.png").read_bytes())
    good, bad, other = bundle.encode_many("image", [files[0], b"no picture", files[2]])
    assert isinstance(bad, ValueError)
    for found, i in ((good, 0), (other, 2)):
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float16
        expected = tokenizer.encode(picture(seed=i)).astype(np.float32)
        np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-10, atol=1e-5)


def test_channels_are_standardised_by_the_configs_mean_and_deviation(tmp_path):
    mean, std = np.array([0.2, -0.1, 0.05], np.float32), np.array([0.5, 2.0, 0.1], np.float32)
    model = tiny_model(latents_mean=mean.tolist(), latents_std=std.tolist())
    KLImageTokenizer(model, 16).save(tmp_path)
    tokenizer = KLImageTokenizer.load(tmp_path)
    patches = tokenizer.encode(picture())
    latents = latents_of(tiny_model(), picture())[0].numpy()
    expected = patchify(((latents - mean[:, None, None]) / std[:, None, None])[None], 2)[0]
    np.testing.assert_allclose(patches.astype(np.float32), expected, rtol=2**-10, atol=1e-4)
    plain = KLImageTokenizer(tiny_model(), 16)
    decoded, same = tokenizer.decode(patches), plain.decode(plain.encode(picture()))
    assert np.abs(np.asarray(decoded, np.int16) - np.asarray(same, np.int16)).max() <= 1
    assert (tokenizer.latent_scale, tokenizer.latent_shift) == (0.7, 0.1)


@pytest.mark.parametrize("std", [None, [0.5, 2.0, 0.1]])
def test_log_variances_stand_behind_the_means(tmp_path, std):
    model = tiny_model(latents_std=std)
    KLImageTokenizer(model, 16, log_variance=True).save(tmp_path)
    tokenizer = KLImageTokenizer.load(tmp_path)
    patches = tokenizer.encode(picture())
    assert patches.shape == (16, 24)
    means = KLImageTokenizer(model, 16).encode(picture())
    np.testing.assert_array_equal(patches[:, :12], means)
    with torch.inference_mode():
        posterior = model.encode(torch.from_numpy(preprocess(picture(), 16))[None]).latent_dist
    # the deviation of a draw, from diffusers, in the units of what is stored
    deviation = posterior.std[0].numpy() / np.array(std or [1, 1, 1], np.float32)[:, None, None]
    found = np.exp(patches[:, 12:].astype(np.float32) / 2)
    np.testing.assert_allclose(found, patchify(deviation[None], 2)[0], rtol=2e-3)
    assert tokenizer.decode(patches).tobytes() == tokenizer.decode(means).tobytes()
    assert KLImageTokenizer.stored_latents(tmp_path) == {
        "patch_width": 12, "latent_scale": 0.7, "latent_shift": 0.1, "log_variance": True
    }  # fmt: skip
    assert tokenizer.fingerprint() != KLImageTokenizer(model, 16).fingerprint()


def test_a_vae_without_a_shift_has_none():
    assert KLImageTokenizer(tiny_model(shift_factor=None), 16).latent_shift == 0.0


def test_mistakes_are_refused(tmp_path):
    tokenizer = KLImageTokenizer(tiny_model(), 16)
    with pytest.raises(ValueError, match=r"a picture has \(16, 12\)"):
        tokenizer.decode(np.zeros((4, 12)))
    with pytest.raises(ValueError, match="not finite"):
        tokenizer.decode(np.full((16, 12), np.nan))
    with pytest.raises(ValueError, match="do not divide into patches of 3"):
        KLImageTokenizer(tiny_model(), 16, patch=3)
    with pytest.raises(ValueError, match="latents_mean must be 3 numbers"):
        KLImageTokenizer(tiny_model(latents_mean=[0.0, 1.0]), 16)
    with pytest.raises(ValueError, match="latents_std must be 3 numbers"):
        KLImageTokenizer(tiny_model(latents_std=[1.0, 0.0, 2.0]), 16)
    large = tiny_model()
    large.requires_grad_(False).quant_conv.weight.mul_(1e9)
    with pytest.raises(ValueError, match="float16 does not hold"):
        KLImageTokenizer(large, 16).encode(picture())
    tokenizer.save(tmp_path)
    (tmp_path / "image_tokenizer.json").write_text('{"resolution": 16}')
    with pytest.raises(ValueError, match="'patch' must be"):
        KLImageTokenizer.load(tmp_path)
    (tmp_path / "image_tokenizer.json").write_text('{"resolution": 16, "patch": 2, "log_varience": true}')
    with pytest.raises(ValueError, match=r"unknown \['log_varience'\]; known: resolution, patch"):
        KLImageTokenizer.load(tmp_path)
    (tmp_path / "image_tokenizer.json").write_text('{"resolution": 16, "patch": 2, "log_variance": 1}')
    with pytest.raises(ValueError, match="'log_variance' must be true or false"):
        KLImageTokenizer.load(tmp_path)
