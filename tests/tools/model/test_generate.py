"""What tools/generate.py writes for a person to look at."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.image.kl import KLImageTokenizer
from mom_train.generate.samples import write_span
from tests.helpers import CHECKOUT


def test_latents_become_a_picture_where_the_tokenizer_makes_latents(tmp_path, monkeypatch):
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

    def faulty(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(KLImageTokenizer, "decode", faulty)
    with pytest.raises(ValueError, match="a bug"):  # no line of a sample, where nobody would look for it
        write_span(tmp_path, "c", "image", latents, tokenizers)


_ALL = """
import contextlib, io, json, sys
from mom_tools.model import generate
for options in json.loads(sys.argv[1]):
    sys.argv, said = ["generate", *options], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            generate.main()
            code = 0
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.getvalue(), "torch" in sys.modules]))
"""


def test_what_cannot_be_sampled_with_is_one_clear_line_before_pytorch_is_imported():
    expected = {
        "--top-p 0": "top_p: Input should be greater than 0",
        "--top-p nan": "top_p: Input should be a finite number",
        "--top-p 1.5": "top_p: Input should be less than or equal to 1",
        "--temperature -1": "temperature: Input should be greater than or equal to 0",
        "--max-tokens 0": "max_tokens: Input should be greater than 0",
        "--denoising-steps 0": "denoising_steps: Input should be greater than 0",
        "--guidance inf": "guidance: Input should be a finite number",
        "--samples 0": "--samples 0: it must be above 0",
        "--patches -3": "--patches -3: it must be above 0",
        "--denoised-limit nan": "--denoised-limit nan: it must be above 0",
        "": "nowhere: no such folder",
    }
    options = json.dumps([["nowhere", *text.split()] for text in expected])
    done = subprocess.run(
        [sys.executable, "-c", _ALL, options], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    for line, message in zip(done.stdout.splitlines(), expected.values(), strict=True):
        code, said, imported = json.loads(line)
        assert code == 2
        assert message in said
        assert len(said.splitlines()) == 1
        assert not imported
