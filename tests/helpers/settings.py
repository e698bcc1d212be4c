"""The settings and architectures of the paper at a size for tests."""

import pydoc_data.topics

import numpy as np
from sklearn.datasets import load_digits

from mom_data.shards.format import ShardWriter, TokenSegment, write_manifest

MAMBA = {"dim": 32, "layers": 1}


TRANSFORMER = {"architecture": "transformer", "dim": 32, "layers": 2, "heads": 2}


ARCHITECTURES = {
    "mom": {**MAMBA, "decoupled": ["in_proj", "x_proj", "dt_proj", "out_proj"]},
    "mamba": {**MAMBA, "decoupled": []},
    "transformer": {**TRANSFORMER, "decoupled": []},
    "mot": {**TRANSFORMER, "decoupled": ["attention", "feed_forward", "norm"]},
}


# beyond the paper, in one setting: a learned choice instead of the rule, and experts inside each modality
ROUTERS = {
    "learned": {**ARCHITECTURES["mom"], "router": "learned"},
    "experts": {**ARCHITECTURES["mom"], "experts": 2, "decoupled": ["in_proj", "out_proj", "norm"]},
}


SETTINGS = {
    "chameleon": {"vocabulary": {"text": 256, "image": 17}},
    "chameleon_speech": {"vocabulary": {"text": 256, "image": 17, "speech": 20}},
    "four_modalities": {"vocabulary": {"text": 256, "image": 17, "speech": 20, "video": 17}},
    "transfusion": {"vocabulary": {"text": 256, "image": 1}, "objective": {"diffusion": {"patch_width": 4}}},
}


def write_digits(folder, vocabulary, continuous):
    """Write documents of handwritten digits after bytes of Python's manual. Digits are 64 codes, or 16 patches of 2 x 2
    pixels, and their column profiles stand in for a third modality."""
    folder.mkdir()
    digits = load_digits()
    manual = "".join(pydoc_data.topics.topics.values()).encode()
    with ShardWriter(folder / "digits.tar", list(vocabulary)) as writer:
        for i, (pixels, digit) in enumerate(zip(digits.images[:300], digits.target, strict=False)):
            text = manual[i * 60 : i * 60 + 60] + b" the digit %d:" % digit
            segments = [TokenSegment(0, np.frombuffer(text, np.uint8).astype(np.uint16))]
            if continuous:
                patches = pixels.reshape(4, 2, 4, 2).transpose(0, 2, 1, 3).reshape(16, 4) / 8 - 1
                segments.append(TokenSegment(1, patches.astype(np.float16)))
            else:
                segments.append(TokenSegment(1, pixels.reshape(-1).astype(np.uint16)))
            if "speech" in vocabulary:
                profile = np.repeat(pixels.sum(0) // 7, 2).clip(max=19)
                segments.append(TokenSegment(2, profile.astype(np.uint16)))
            if "video" in vocabulary:  # three frames of the digit scrolling up
                frames = [np.roll(pixels, -shift, 0)[::2, ::2] for shift in (0, 2, 4)]
                segments.append(TokenSegment(3, np.stack(frames).reshape(-1).astype(np.uint16)))
            writer.add(str(i), segments)
    tokenizers = {m: {"kind": "test", "fingerprint": m, "size": n} for m, n in vocabulary.items()}
    write_manifest(folder, [writer.record()], tokenizers, np.uint16, {})
