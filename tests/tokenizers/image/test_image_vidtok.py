from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.image.autoencoder import preprocess
from mom_tokenizers.image.vidtok import VidTokImageTokenizer

if not hasattr(diffusers, "AutoencoderVidTok"):
    pytest.skip(f"diffusers {diffusers.__version__} has no AutoencoderVidTok", allow_module_level=True)
from diffusers import AutoencoderVidTok

CODES = 512


def build(**changes):
    torch.manual_seed(0)
    settings = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "regularizer": "fsq", "z_channels": 3,
                "double_z": False, "codebook_size": CODES}  # fmt: skip
    model: Any = AutoencoderVidTok(**{**settings, **changes})
    if model.config.regularizer == "fsq" and model.config.is_causal:
        torch.nn.init.normal_(model.encoder.conv_out.conv.weight, std=0.2)  # so that many codes occur
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return VidTokImageTokenizer(build(), 32)


def picture(seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((40, 30), Image.Resampling.BICUBIC)


def test_a_code_is_the_number_whose_digits_are_the_rounded_latents(tokenizer):
    codes = tokenizer.encode(picture())
    assert codes.shape == (16,)
    assert len(set(codes.tolist())) > 3
    video = torch.from_numpy(preprocess(picture(), 32))[None, :, None].repeat(1, 1, 4, 1, 1)
    model = build()
    with torch.inference_mode():
        model._empty_causal_cached(model.encoder)
        model._set_first_chunk(True)
        latents = model.encoder(video)[0, :, 0].flatten(1).T.double().numpy()  # (16, 3)
    # FSQ with 8 levels (arXiv 2309.15505), with the constants of VidTok: z -> tanh(z + shift) * half - 1/2
    half = 7 * (1 + 1e-3) / 2
    digits = np.round(np.tanh(latents + np.arctanh(0.5 / half)) * half - 0.5) + 4
    assert digits.min() >= 0
    assert digits.max() <= 7
    np.testing.assert_array_equal(codes, digits @ [1, 8, 64])


def test_decode_is_the_librarys_own_and_a_picture_of_the_right_size(tokenizer):
    codes = tokenizer.encode(picture())
    video = torch.from_numpy(preprocess(picture(), 32))[None, :, None].repeat(1, 1, 4, 1, 1)
    model = build()
    with torch.inference_mode():
        quantized, _ = model.encode(video)
        own = model.decode(quantized)[0]  # (3, 1, 32, 32)
    assert own.shape[1] == 1
    expected = ((own[:, 0].clamp(-1, 1) + 1) * 127.5).numpy().transpose(1, 2, 0)
    assert expected.std() > 0.5
    assert np.abs(np.asarray(tokenizer.decode(codes), np.float32) - expected).max() < 0.51


def test_a_batch_gives_the_codes_of_one_by_one(tokenizer):
    pictures = [picture(seed) for seed in range(6)]
    together, alone = np.stack(tokenizer.encode_batch(pictures)), np.stack([tokenizer.encode(p) for p in pictures])
    assert np.mean(together == alone) > 0.98  # a latent may lie on the border of two levels to rounding


def test_save_and_load_keep_codes_and_fingerprint(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "image")
    (tmp_path / "words").mkdir()
    (tmp_path / "t.yaml").write_text("text: {kind: bpe, path: words}\nimage: {kind: vidtok, path: image}")
    bundle = Tokenizers.load(tmp_path / "t.yaml")
    loaded = bundle.tokenizer("image")
    np.testing.assert_array_equal(loaded.encode(picture()), tokenizer.encode(picture()))
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.size == VidTokImageTokenizer.stored_size(tmp_path / "image") == CODES


@pytest.mark.parametrize(
    "changes",
    [{"regularizer": "kl", "double_z": True, "z_channels": 4}, {"is_causal": False}],
)
def test_models_without_codes_or_that_cannot_decode_one_picture_are_refused(changes):
    with pytest.raises(ValueError, match="reads regularizer 'fsq' with is_causal true"):
        VidTokImageTokenizer(build(**changes), 32)
