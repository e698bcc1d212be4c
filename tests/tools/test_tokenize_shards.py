"""tools/tokenize_shards.py as a process, on real tokenizers trained here."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
import yaml
from PIL import Image

from mom_data.dataset import TokenDataset
from mom_data.document import read_documents
from mom_tokenizers.bundle import Tokenizers

TOOLS = Path(__file__).parents[2] / "tools"
RECIPE = {
    "text": {"size": 300},
    "image": {"size": 16, "resolution": 8, "block_out_channels": [8, 16], "latent_channels": 4, "batch_size": 8,
              "max_images": 40, "autoencoder_steps": 5, "quantized_steps": 5},
    "speech": {"size": 8, "max_seconds": 6},
}  # fmt: skip


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Raw shards (one with samples that cannot be read) and tokenizers trained on them."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    (folder / "raw").mkdir()
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"raw/part-{shard}.tar"), mtime=0) as tar:
            for i in range(40):
                picture = encoded(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
                sound = io.BytesIO()
                soundfile.write(sound, rng.normal(0, 0.1, 8_000), 16_000, format="FLAC")
                segments = [
                    {"type": "text", "text": f"number {i} of {shard}, ünïcode"},
                    {"type": "image", "part": "0.png"},
                ]
                segments += [{"type": "speech", "part": "1.flac"}]
                sample = {"__key__": f"d{i:03d}", "json": json.dumps({"segments": segments}).encode()}
                tar.write({**sample, "0.png": picture, "1.flac": sound.getvalue()})
            if shard == 1:
                tar.write({"__key__": "no-picture", "png": b"not a picture", "txt": "caption"})
                tar.write({"__key__": "no-sound", "flac": b"not a recording", "txt": "caption"})
                tar.write({"__key__": "no-json", "json": b"{"})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    train = [sys.executable, str(TOOLS / "train_tokenizers.py"), "--config", str(folder / "recipe.yaml")]
    train += ["--input", str(folder / "raw"), "--output", str(folder / "tokenizers")]
    subprocess.run(train, check=True, capture_output=True)
    return folder


def command(made, output, *more, raw=None):
    tool = [sys.executable, str(TOOLS / "tokenize_shards.py"), "--config", str(made / "tokenizers/tokenizers.yaml")]
    return [*tool, "--input", str(raw or made / "raw"), "--output", str(output), *more]


def run(*args, code=0, **kwargs):
    done = subprocess.run(command(*args, **kwargs), capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-2000:]
    return done


def checksums(folder):
    files = [p for p in folder.iterdir() if p.is_file()]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def tokens(made):
    run(made, made / "tokens", "--workers", "2")
    return made / "tokens"


def test_every_document_is_there_with_the_tokens_of_its_parts(made, tokens):
    tokenizers, dataset = Tokenizers.load(made / "tokenizers/tokenizers.yaml"), TokenDataset(tokens)
    assert [s["name"] for s in dataset.shards] == [f"part-{i}-00000.tar" for i in range(3)]
    assert dataset.tokenizers == tokenizers.describe()
    for shard in range(3):
        documents = [d for d in read_documents(made / f"raw/part-{shard}.tar") if d.key.startswith("d")]
        for d in (0, 17, 39):
            segments = dataset.read(shard, d)
            text, image, speech = documents[d].segments
            assert tokenizers.tokenizer("text").decode(segments[0].values) == text.data
            assert np.array_equal(segments[1].values, tokenizers.encode("image", image.data))
            assert np.array_equal(segments[2].values, tokenizers.encode("speech", speech.data))
            assert [len(s.values) for s in segments[1:]] == [16, 13]  # 8/2 squared codes; half a second at 25 Hz


def test_samples_that_cannot_be_read_are_skipped_counted_and_listed(tokens):
    skipped = [json.loads(line) for line in (tokens / "skipped.jsonl").read_text().splitlines()]
    assert {(s["shard"], s["key"]) for s in skipped} == {
        ("part-1.tar", k) for k in ("no-picture", "no-sound", "no-json")
    }
    assert TokenDataset(tokens).manifest["documents"] == 120


def test_too_many_unreadable_samples_are_an_error_and_nothing_is_lost(made, tmp_path):
    error = run(made, tmp_path / "t", "--max-bad-fraction", "0.01", code=2).stderr
    assert "3 of 123 documents could not be read" in error
    assert not (tmp_path / "t/manifest.json").exists()
    run(made, tmp_path / "t", "--max-bad-fraction", "0.1")
    assert TokenDataset(tmp_path / "t").manifest["documents"] == 120


def test_killed_at_any_moment_it_finishes_with_the_same_bytes(made, tokens, tmp_path):
    output = tmp_path / "t"
    process = subprocess.Popen(
        command(made, output, "--workers", "1"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.time() + 300
    while not list(output.glob(".parts/*.json")):
        assert time.time() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "manifest.json").exists()
    run(made, output, "--workers", "2")
    assert checksums(output) == checksums(tokens)
    before = {p: p.stat().st_mtime_ns for p in output.glob("*.tar")}
    run(made, output)
    assert {p: p.stat().st_mtime_ns for p in output.glob("*.tar")} == before


def test_train_and_val_split_the_documents_between_them(made, tokens, tmp_path):
    totals = {}
    for part in ("train", "val"):
        run(made, tmp_path / part, "--split", part, "--holdout", "0.3")
        totals[part] = TokenDataset(tmp_path / part).manifest["documents"]
    assert sum(totals.values()) == 120
    assert 10 < totals["val"] < 70


def test_a_damaged_or_missing_input_is_one_clear_message(made, tmp_path):
    content = (made / "raw/part-0.tar").read_bytes()
    (tmp_path / "bad.tar").write_bytes(content[: len(content) // 2])
    error = run(made, tmp_path / "t", raw=tmp_path / "bad.tar", code=2).stderr
    assert "bad.tar" in error
    assert "Traceback" not in error
    error = run(made, tmp_path / "t", raw=tmp_path / "none.tar", code=2).stderr
    assert "no input matches" in error


def test_a_run_refuses_shards_of_other_tokenizers(made, tokens, tmp_path):
    from mom_train.config import load_config
    from mom_train.trainer import build_plans

    other = made / "tokenizers2"
    recipe = made / "recipe2.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "text": {"size": 280}}))
    train = [sys.executable, str(TOOLS / "train_tokenizers.py"), "--config", str(recipe), "--input", str(made / "raw")]
    subprocess.run([*train, "--output", str(other)], check=True, capture_output=True)
    overrides = [
        f"data.train=[{{path: {tokens}}}]", "data.validation={}", f"run_dir={tmp_path}", "data.sequence_length=64",
    ]  # fmt: skip
    config = TOOLS.parent / "configs/demo.yaml"
    build_plans(load_config(config, [*overrides, f"tokenizers={made}/tokenizers/tokenizers.yaml"]))
    with pytest.raises(
        ValueError, match=r"text tokenizers differ: .*tokens was made with \w{16}, the run's .*has \w{16}"
    ):
        build_plans(load_config(config, [*overrides, f"tokenizers={other}/tokenizers.yaml"]))


@pytest.fixture(scope="module")
def continuous(made):
    """A tokenizers folder beside the other: the same text, a KL-VAE with random weights, no speech."""
    import torch
    from diffusers import AutoencoderKL

    from mom_tokenizers.image_kl import KLImageTokenizer

    folder = made / "continuous"
    shutil.copytree(made / "tokenizers/text", folder / "text")
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, norm_num_groups=2,
        scaling_factor=0.7, shift_factor=0.1,
    )  # fmt: skip
    KLImageTokenizer(model, 16).save(folder / "image")
    (folder / "tokenizers.yaml").write_text("text: {kind: bpe, path: text}\nimage: {kind: kl, path: image}\n")
    tool = [sys.executable, str(TOOLS / "tokenize_shards.py"), "--config", str(folder / "tokenizers.yaml")]
    tool += ["--input", str(made / "raw"), "--output", str(folder / "tokens"), "--workers", "2"]
    refused = subprocess.run(tool, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "no document could be read" in refused.stderr  # without being told to, nothing is left out
    subprocess.run([*tool, "--drop-modalities", "speech"], check=True, capture_output=True)
    return folder


def test_latents_reach_the_shards_bit_for_bit(made, continuous):
    import torch

    tokenizers, dataset = Tokenizers.load(continuous / "tokenizers.yaml"), TokenDataset(continuous / "tokens")
    assert dataset.tokenizers == tokenizers.describe()
    assert dataset.manifest["latent_width"] == dataset.tokenizers["image"]["patch_width"] == 12
    assert (dataset.tokenizers["image"]["latent_scale"], dataset.tokenizers["image"]["latent_shift"]) == (0.7, 0.1)
    # no-sound is a caption and a recording: without speech, its text stays
    assert dataset.manifest["documents"] == 121
    assert dataset.manifest["tokens"]["image"] == 120 * 16
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))  # as the workers: sums in the same order
    try:
        for shard in range(3):
            documents = [d for d in read_documents(made / f"raw/part-{shard}.tar") if d.key.startswith("d")]
            pictures = [d.segments[1].data for d in documents]
            for number, expected in enumerate(tokenizers.encode_many("image", pictures)):
                text, image = dataset.read(shard, number)
                assert tokenizers.tokenizer("text").decode(text.values) == documents[number].segments[0].data
                assert image.values.dtype == np.float16
                assert image.values.tobytes() == expected.tobytes()
    finally:
        torch.set_num_threads(before)


def test_a_run_takes_scale_and_shift_from_its_shards(made, tokens, continuous, tmp_path):
    from mom_train.config import load_config
    from mom_train.trainer import build_plans, resolve_latents

    config = TOOLS.parent / "configs/demo_transfusion.yaml"

    def resolved(folder, *more, diffusion="{patch_width: 12}"):
        overrides = [f"data.train=[{{path: {folder}}}]", "data.validation={}", f"run_dir={tmp_path}", "tokenizers=null"]
        overrides += ["data.sequence_length=64", "vocabulary={text: 2048, image: 512, speech: 200}"]
        run_config = load_config(config, [*overrides, f"objective.diffusion={diffusion}", *more])
        return resolve_latents(run_config, build_plans(run_config)[0]).objective.diffusion

    found = resolved(continuous / "tokens")
    assert (found.latent_scale, found.latent_shift) == (0.7, 0.1)
    found = resolved(continuous / "tokens", diffusion="{patch_width: 12, latent_scale: 2.0}")
    assert (found.latent_scale, found.latent_shift) == (2.0, 0.1)
    with pytest.raises(ValueError, match=r"patches of 12 values, objective.diffusion.patch_width is\s+16"):
        resolved(continuous / "tokens", diffusion="{patch_width: 16}")
    with pytest.raises(ValueError, match="holds latent patches"):
        resolved(continuous / "tokens", diffusion="null")
    assert resolved(tokens, diffusion="null") is None  # codes: nothing to resolve

    other = tmp_path / "other"
    shutil.copytree(continuous / "tokens", other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizers"]["image"]["latent_scale"] = 0.5
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"latents differ: .*scale 0.7 and shift 0.1, .*other has scale 0.5"):
        resolved(other, f"data.train=[{{path: {continuous / 'tokens'}}}, {{path: {other}}}]")


def test_a_modality_with_a_tokenizer_is_not_dropped(made, tmp_path):
    error = run(made, tmp_path / "t", "--drop-modalities", "speech", code=2).stderr
    assert "has a tokenizer for it" in error
