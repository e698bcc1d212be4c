"""What tools/generate.py writes for a person to look at."""

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.image_kl import KLImageTokenizer
from mom_train.sampling import write_span


def test_latents_become_a_picture_where_the_tokenizer_makes_latents(tmp_path):
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, norm_num_groups=2,
    )  # fmt: skip
    tokenizer = KLImageTokenizer(model, 16)
    tokenizer.save(tmp_path / "image")
    tokenizers = Tokenizers((("image", "kl", tmp_path / "image"),))
    latents = torch.randn(16, 12)
    assert write_span(tmp_path, "a", "image", latents, tokenizers).markdown == "![picture](a.png)"
    assert np.array_equal(np.load(tmp_path / "a.npy"), latents.numpy())
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(tokenizer.decode(latents.numpy())))
    # with --patches of another number: the latents stay, and the line says why there is no picture
    line = write_span(tmp_path, "b", "image", latents[:4], tokenizers).markdown
    assert "b.npy" in line
    assert "a picture has (16, 12)" in line
    assert not (tmp_path / "b.png").exists()
