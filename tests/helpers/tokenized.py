"""A small run with real tokenizers: words by a trained BPE, pictures as latents of a KL autoencoder."""

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from mom_data.shards.format import ShardWriter, TokenSegment, write_manifest
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.image.kl import KLImageTokenizer
from mom_tokenizers.text import TextTokenizer
from mom_train.config.run import RunConfig

WORDS = ["one", "zwei", "trois", "ни", "五", "größer", "→", "the", "model", "reads", "and", "draws", "🎉", "pictures"]


def write_tokenizers(folder):
    TextTokenizer.train([" ".join(WORDS)] * 4, 300).save(folder / "text")
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, norm_num_groups=2,
    )  # fmt: skip
    KLImageTokenizer(model, 16).save(folder / "image")
    path = folder / "tokenizers.yaml"
    path.write_text("text: {kind: bpe, path: text}\nimage: {kind: kl, path: image}\n")
    return path


def write_documents(folder, tokenizers, documents, seed):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    with ShardWriter(folder / "part-00000.tar", ("text", "image")) as writer:
        for d in range(documents):
            text = " ".join(rng.choice(WORDS, rng.integers(3, 30)))
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            patches = tokenizers.tokenizer("image").encode(Image.fromarray(pixels))
            segments = [TokenSegment(0, tokenizers.encode("text", text).astype(np.uint16)), TokenSegment(1, patches)]
            writer.add(f"document-{d}", segments)
    write_manifest(folder, [writer.record()], tokenizers.describe(), np.uint16, {})


def tokenized_config(folder, **changes):
    """A config with its tokenizers and data in `folder`, which are made where they are missing."""
    path = folder / "tokenizers" / "tokenizers.yaml"
    if not path.exists():
        (folder / "tokenizers").mkdir(parents=True)
        write_tokenizers(folder / "tokenizers")
        tokenizers = Tokenizers.load(path)
        write_documents(folder / "train", tokenizers, 120, seed=1)
        write_documents(folder / "val", tokenizers, 40, seed=2)
    tokenizers = Tokenizers.load(path)
    described = tokenizers.describe()
    values = {
        "run_dir": str(folder / "run"),
        "vocabulary": {"text": described["text"]["size"], "image": 1},
        "tokenizers": str(path),
        "model": {"dim": 32, "layers": 1, "decoupled": ["in_proj", "out_proj"]},
        "objective": {"diffusion": {"patch_width": described["image"]["patch_width"]}},
        "data": {
            "train": [{"path": str(folder / "train")}],
            "validation": {"held": [{"path": str(folder / "val")}]},
            "sequence_length": 128,
            "lanes": 2,
            "workers": 0,
        },
        "optimizer": {"learning_rate": 0.01, "warmup": 2},
        "training": {"steps": 8, "batch": 4, "micro_batch": 2},
        "validation": {"every": 2, "sequences": 5},
    }
    return RunConfig.model_validate(values | changes)
