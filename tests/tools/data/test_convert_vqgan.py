import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.image.autoencoder import VQImageTokenizer, preprocess
from mom_tools.data import convert_vqgan as tool
from tests.helpers import CHECKOUT

TOOL = CHECKOUT / "tools" / "convert_vqgan.py"


class Residual(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, before, eps=1e-6), nn.GroupNorm(32, after, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x):
        y = self.conv1(swish(self.norm1(x)))
        y = self.conv2(swish(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Attention of one head over all positions, as loops over the formula softmax(q k / sqrt(C)) v."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2) for f in (self.q, self.k, self.v))
        weights = torch.einsum("bci,bcj->bij", q, k).div(x.shape[1] ** 0.5).softmax(-1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))


class Level(nn.Module):
    downsample: Any
    upsample: Any

    def __init__(self, widths, attention, sampler=None):
        super().__init__()
        self.block = nn.ModuleList(Residual(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(Attention(width) for width in widths[1:] if attention)
        if sampler:
            setattr(self, sampler, nn.Module())
            getattr(self, sampler).conv = nn.Conv2d(widths[-1], widths[-1], 3, 2 if sampler == "downsample" else 1)

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        if hasattr(self, "downsample"):  # padded below and to the right only
            x = self.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        if hasattr(self, "upsample"):
            x = self.upsample.conv(F.pad(x.repeat_interleave(2, 2).repeat_interleave(2, 3), (1, 1, 1, 1)))
        return x


class Coder(nn.Module):
    """The encoder or the decoder, with the published names."""

    def __init__(self, side, channels_in, channels_out, widths, blocks, attention):
        super().__init__()
        last = len(widths) - 1
        if side == "down":
            first = widths[0]
            levels = [
                Level([widths[max(i - 1, 0)]] + [w] * blocks, i in attention, "downsample" if i < last else None)
                for i, w in enumerate(widths)
            ]
            middle, end = widths[-1], widths[-1]
        else:
            first = middle = widths[-1]
            levels = [
                Level([widths[min(i + 1, last)]] + [w] * (blocks + 1), i in attention, "upsample" if i else None)
                for i, w in enumerate(widths)
            ]
            end = widths[0]
        self.conv_in = nn.Conv2d(channels_in, first, 3, padding=1)
        setattr(self, side, nn.ModuleList(levels))
        self.mid: Any = nn.Module()
        self.mid.block_1, self.mid.attn_1 = Residual(middle, middle), Attention(middle)
        self.mid.block_2 = Residual(middle, middle)
        self.norm_out = nn.GroupNorm(32, end, eps=1e-6)
        self.conv_out = nn.Conv2d(end, channels_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in getattr(self, "down", ()):
            x = level(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for level in reversed(getattr(self, "up", ())):  # up.0 makes the picture: last
            x = level(x)
        return self.conv_out(swish(self.norm_out(x)))


class PublishedVQGAN(nn.Module):
    """The architecture of the published checkpoints, written from its description: an oracle of names and numbers."""

    def __init__(self, widths=(32, 64, 64), blocks=2, attention=(2,), latent=24, embed=16, codes=64):
        super().__init__()
        self.encoder = Coder("down", 3, latent, widths, blocks, attention)
        self.decoder = Coder("up", latent, 3, widths, blocks, attention)
        self.quantize: Any = nn.Module()
        self.quantize.embedding = nn.Embedding(codes, embed)
        self.quant_conv: Any
        self.post_quant_conv: Any
        self.quant_conv, self.post_quant_conv = nn.Conv2d(latent, embed, 1), nn.Conv2d(embed, latent, 1)

    def encode(self, x):
        latents = self.quant_conv(self.encoder(x)).permute(0, 2, 3, 1)
        distances = (latents[..., None, :] - self.quantize.embedding.weight).square().sum(-1)
        return distances.argmin(-1)

    def decode(self, codes):
        return self.decoder(self.post_quant_conv(self.quantize.embedding(codes).permute(0, 3, 1, 2)))


def swish(x):
    return x * torch.sigmoid(x)


def published(**settings):
    torch.manual_seed(0)
    model = PublishedVQGAN(**settings).eval().requires_grad_(False)
    for module in model.modules():  # no norm or bias may hide as ones and zeros
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    with torch.inference_mode():  # a codebook among the latents, so that many codes occur
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        vectors = model.quant_conv(model.encoder(x)).permute(0, 2, 3, 1).flatten(0, 2)
        count = len(model.quantize.embedding.weight)
        model.quantize.embedding.weight.copy_(vectors[torch.randperm(len(vectors))[:count]])
    return model


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the tool in this process, which has imported torch already. Returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["convert_vqgan.py", *map(str, arguments)])
        code: Any = 0
        try:
            tool.main()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def picture(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((48, 40), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("settings", [{}, {"widths": (32, 32, 64, 96), "blocks": 1, "attention": ()}], ids=str)
def test_codes_and_pixels_are_those_of_the_published_architecture(tmp_path, run, settings):
    model = published(**settings)
    lightning = {f"loss.discriminator.{i}": torch.zeros(2) for i in range(3)}
    torch.save({"state_dict": {**model.state_dict(), **lightning}, "global_step": 7}, tmp_path / "vqgan.ckpt")
    code, out, errors = run(tmp_path / "vqgan.ckpt", "--output", tmp_path / "image", "--resolution", 32, "--json")
    assert code == 0, errors
    figures = json.loads(out)
    assert (figures["left_out"], figures["without_place"]) == (3, [])
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())

    (tmp_path / "words").mkdir()
    (tmp_path / "t.yaml").write_text("text: {kind: bpe, path: words}\nimage: {kind: vq, path: image}")
    tokenizer: Any = Tokenizers.load(tmp_path / "t.yaml").tokenizer("image")
    assert tokenizer.fingerprint() == figures["fingerprint"]
    pictures = [picture(seed) for seed in range(6)]
    pixels = torch.from_numpy(np.stack([preprocess(p, 32) for p in pictures]))
    with torch.inference_mode():
        codes = model.encode(pixels)
        decoded = model.decode(codes)
    found = np.stack(tokenizer.encode_batch(pictures))
    assert len(np.unique(found)) > 8, "the codes must differ, or equal ones say little"
    np.testing.assert_array_equal(found, codes.flatten(1).numpy())
    with torch.inference_mode():
        torch.testing.assert_close(tokenizer.reconstruct(codes), decoded, rtol=1e-4, atol=1e-4)
    assert decoded.std() > 0.01
    shown = ((decoded[0].clamp(-1, 1) + 1) * 127.5).numpy().transpose(1, 2, 0)
    assert np.abs(np.asarray(tokenizer.decode(found[0]), np.float32) - shown).max() < 0.51


def test_the_published_size_of_chameleon_is_inferred_from_its_shapes():
    with torch.device("meta"):
        ours = PublishedVQGAN((128, 128, 256, 256, 512), 2, (), 256, 256, 8192).state_dict()
        model: Any = VQModel(**tool.model_config(ours))
    assert {tool.rename(name, 5) for name in ours} == set(model.state_dict())
    assert sum(value.numel() for value in model.state_dict().values()) == sum(value.numel() for value in ours.values())
    tokenizer = VQImageTokenizer(model, 512)
    assert (tokenizer.size, tokenizer.codes_per_image) == (8192, 1024)


def test_safetensors_are_read_and_what_has_no_place_is_named(tmp_path, run):
    tensors = {name: value.contiguous() for name, value in published().state_dict().items()}
    save_file({**tensors, "quantize.used": torch.zeros(3)}, tmp_path / "vqgan.safetensors")
    code, out, errors = run(tmp_path / "vqgan.safetensors", "--output", tmp_path / "image", "--resolution", 64)
    assert code == 0, errors
    assert "without a place: quantize.used" in out
    assert "256 a picture of 64 pixels" in out


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_files_that_are_no_checkpoints_are_refused_and_never_run(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = published().state_dict()
    torch.save({"state_dict": tensors, "callbacks": Payload()}, "pickle.ckpt")
    Path("text.pt").write_text("no checkpoint")
    Path("text.safetensors").write_text("no checkpoint")
    torch.save({"weight": torch.zeros(2)}, "other.pt")
    torch.save({k: v for k, v in tensors.items() if "decoder.up.1" not in k}, "part.pt")
    torch.save({**tensors, "quant_conv.weight": torch.zeros(16, 3, 1, 1)}, "shape.pt")
    torch.save({**tensors, "encoder.mid.block_3.conv1.weight": torch.zeros(2)}, "more.pt")
    for name, message in {
        "more.pt": "1 tensors have no place in a VQModel",
        "pickle.ckpt": "could run code",
        "text.pt": "could run code",  # an old pickle, as far as torch can tell
        "text.safetensors": "not a checkpoint",
        "other.pt": "plain codebook",
        "part.pt": "have no source, e.g. decoder.up_blocks.1",
        "shape.pt": r"quant_conv.weight is (16, 3, 1, 1)",
        "absent.pt": "no such file",
    }.items():
        code, _, errors = run(name, "--output", "image")
        assert (code, message in errors) == (2, True), f"{name}: {errors}"
        assert not Path("image").exists()
    assert not Path("ran").exists()
