"""tools/bench_tokenizers.py as a process, on tokenizers and documents made here."""

import io
import json

import numpy as np
import pytest
import soundfile
import webdataset
from diffusers import VQModel
from PIL import Image

from mom_tokenizers.image.autoencoder import VQImageTokenizer
from mom_tokenizers.speech.units import SpeechTokenizer
from mom_tokenizers.text import TextTokenizer
from tests.helpers import CHECKOUT
from tests.helpers.ranks import program

TOOL = CHECKOUT / "tools/bench_tokenizers.py"
TEXTS = [f"document {i} tells of pictures and sounds" for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench")
    rng = np.random.default_rng(0)
    TextTokenizer.train(TEXTS, 300).save(path / "text")
    model = VQModel(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                    up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, num_vq_embeddings=16)  # fmt: skip
    VQImageTokenizer(model, 8).save(path / "image")
    SpeechTokenizer(rng.normal(size=(6, 160))).save(path / "speech")
    (path / "tokenizers.yaml").write_text(
        "text: {kind: bpe, path: text}\nimage: {kind: vq, path: image}\nspeech: {kind: units, path: speech}\n"
    )
    with webdataset.TarWriter(str(path / "raw.tar")) as tar:
        for i, text in enumerate(TEXTS):
            picture, sound = io.BytesIO(), io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(picture, ("PNG", "JPEG")[i % 2])
            soundfile.write(sound, rng.normal(0, 0.1, 16_000), 16_000, format="FLAC")
            if i == 0:
                picture = io.BytesIO(b"no picture")
            if i == 1:
                sound = io.BytesIO(sound.getvalue()[:600])
            parts = [
                {"type": "text", "text": text},
                {"type": "image", "part": "0.png"},
                {"type": "speech", "part": "1.flac"},
            ]
            tar.write({"__key__": f"{i:03d}", "json": json.dumps({"segments": parts}).encode(),
                       "0.png": picture.getvalue(), "1.flac": sound.getvalue()})  # fmt: skip
    return path


def run(*arguments):
    return program(TOOL, *arguments)


def test_every_stage_is_measured_on_what_can_be_read(folder):
    out = folder / "figures.json"
    done = run("--tokenizers", folder / "tokenizers.yaml", "--input", folder / "raw.tar", "--json", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["documents"] == 12
    stages = {(s["modality"], s["stage"]): s for s in found["stages"]}
    assert list(stages) == [
        ("text", "encode"),
        ("image", "decode JPEG"), ("image", "decode PNG"), ("image", "decode other"),
        ("image", "resize"), ("image", "encode (vq)"),
        ("speech", "decode"), ("speech", "resample"), ("speech", "features"), ("speech", "nearest unit"),
        ("all", "write"), ("all", "whole path"),
    ]  # fmt: skip
    assert stages["text", "encode"]["amounts"]["MB"] == sum(map(len, TEXTS)) / 1e6
    assert stages["image", "decode JPEG"]["amounts"]["pictures"] == 6
    assert stages["image", "decode JPEG"]["amounts"]["megapixels"] == pytest.approx(6 * 600 / 1e6)
    assert stages["image", "decode other"]["amounts"]["pictures"] == 0
    assert stages["image", "encode (vq)"]["amounts"] == {"pictures": 11, "tokens": 11 * 16}
    assert stages["speech", "decode"]["amounts"]["seconds_of_sound"] == 11
    assert stages["speech", "nearest unit"]["amounts"]["tokens"] == 11 * 25
    # the two damaged documents are not written
    assert stages["all", "write"]["amounts"]["documents"] == 10
    for row in found["stages"]:
        for unit, amount in row["amounts"].items():
            if row["cpu_seconds"]:
                assert row["per_cpu_second"][unit] == pytest.approx(amount / row["cpu_seconds"])
    assert done.stdout.count("\n| ") == len(stages) + 1


def test_json_on_standard_output_is_nothing_but_json(folder):
    done = run("--tokenizers", folder / "tokenizers.yaml", "--input", folder / "raw.tar", "--documents", 3, "--json")
    assert json.loads(done.stdout)["documents"] == 3


def test_mistakes_end_with_one_message(folder, tmp_path):
    done = run("--tokenizers", tmp_path / "none.yaml", "--input", folder / "raw.tar")
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (
        2, [f"bench_tokenizers.py: error: {tmp_path}/none.yaml: no such file or directory"]
    )  # fmt: skip
    assert (
        run("--tokenizers", folder / "tokenizers.yaml", "--input", folder / "raw.tar", "--documents", 0).returncode == 2
    )
