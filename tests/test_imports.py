"""Training on token shards needs none of the packages that only preprocessing needs."""

import json
import os
import subprocess
import sys

import numpy as np

from mom_data.shards.format import TokenSegment
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.speech.units import SpeechTokenizer
from mom_tokenizers.text import TextTokenizer
from tests.helpers import CHECKOUT
from tests.helpers.corpus import write_dataset
from tests.helpers.run_config import write_config
from tests.helpers.tiny_tokenizers import random_vq

# What the extra [tokenizers] installs. matplotlib brings Pillow along wherever it is, but a training does without it.
WITHOUT = """
import sys
absent = {"soundfile", "soxr", "PIL", "transformers", "diffusers", "sklearn", "tokenizers", "huggingface_hub"}
class Without:
    # A finder that finds everything else, so that a package looks as if it were not installed.
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
from mom_train.__main__ import main
main()
"""


def test_a_run_on_token_shards_that_names_its_tokenizers_needs_no_package_of_preprocessing(tmp_path):
    made = tmp_path / "tokenizers"
    TextTokenizer.train(["some words and some more words"] * 9, 280).save(made / "text")
    random_vq(8).save(made / "image")
    SpeechTokenizer(np.random.default_rng(0).normal(size=(20, 160))).save(made / "speech")
    kinds = {"text": "bpe", "image": "vq", "speech": "units"}
    path = made / "tokenizers.yaml"
    path.write_text("".join(f"{m}: {{kind: {kind}, path: {m}}}\n" for m, kind in kinds.items()))
    described = Tokenizers.load(path).describe()
    assert Tokenizers.load(path).fingerprints() == {m: d["fingerprint"] for m, d in described.items()}

    def make(rng, latent_width):
        return [TokenSegment(m, rng.integers(0, 16, 12).astype(np.uint16)) for m in range(3)]

    for name, documents in (("train", 60), ("val", 30)):
        write_dataset(tmp_path / name, documents, shards=1, tokenizers=described, make=make)
    config = write_config(
        tmp_path,
        vocabulary={m: d["size"] for m, d in described.items()},
        tokenizers=str(path),
        optimizer__warmup=0,
        training__steps=1,
        validation={"every": 1, "sequences": 2},
    )
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(config)],
        cwd=CHECKOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *_, line = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if "held" in line
    ]
    # the bytes of the text are known from the names of its tokens
    (bits,) = [value for name, value in line.items() if name.endswith("bits_per_byte/text")]
    assert 1 < bits < 50
