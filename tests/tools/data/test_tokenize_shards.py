"""tools/tokenize_shards.py as a process, on real tokenizers trained here."""

import hashlib
import io
import json
import os
import random
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

from mom_data.documents.document import read_documents
from mom_data.shards.dataset import TokenDataset
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.text import TextTokenizer
from tests.helpers import CHECKOUT
from tests.helpers.corpus import rewrite_manifest
from tests.helpers.ranks import program

TOOLS = CHECKOUT / "tools"
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
    train = [TOOLS / "train_tokenizers.py", "--config", folder / "recipe.yaml", "--input", folder / "raw"]
    program(*train, "--output", folder / "tokenizers").check_returncode()
    return folder


def command(made, output, *more, raw=None):
    tool = [sys.executable, str(TOOLS / "tokenize_shards.py"), "--config", str(made / "tokenizers/tokenizers.yaml")]
    return [*tool, "--input", str(raw or made / "raw"), "--output", str(output), *more]


def run(*args, code=0, process=False, **kwargs):
    """Run the tool: with process=True as a user starts it, otherwise in a process that has imported torch already."""
    line = command(*args, **kwargs)
    if process:
        done = subprocess.run(line, capture_output=True, text=True)
    else:
        done = program("mom_tools.data.tokenize_shards", *line[2:])
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


def write_words(folder, number):
    rng = random.Random(1)
    (folder / "raw").mkdir()
    for name in ("a", "b"):
        texts = [" ".join(str(rng.random()) for _ in range(40)) for _ in range(number)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"raw/{name}.jsonl").write_text("\n".join([*lines, "no json"]) + "\n")
    TextTokenizer.train(texts[:100], 300).save(folder / "tokenizers/text")
    (folder / "tokenizers/tokenizers.yaml").write_text("text: {kind: bpe, path: text}\n")
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Lines of text and a tokenizer for nothing else, with which processes start soon."""
    return write_words(tmp_path_factory.mktemp("words"), 1200)


@pytest.fixture(scope="module")
def many_words(tmp_path_factory):
    """The same with so many lines that there is time to kill processes at their work."""
    return write_words(tmp_path_factory.mktemp("many"), 4000)


def test_after_success_with_several_workers_nothing_is_said_but_the_result(words, tmp_path):
    """Workers once went on while their parent was being torn down, and printed what broke under them."""
    for turn in range(3):
        done = run(words, tmp_path / f"t{turn}", "--workers", "2", "--part-mib", "0.5", process=True)
        for word in ("Traceback", "Exception", "Error", "resource_tracker"):
            assert word not in done.stderr


PARTS = ("--part-mib", "0.25", "--shard-mib", "0.1")  # several shards a part


@pytest.fixture(scope="module")
def undisturbed(words):
    run(words, words / "tokens", "--workers", "1", *PARTS)
    return words / "tokens"


@pytest.fixture(scope="module")
def many_undisturbed(many_words):
    run(many_words, many_words / "tokens", "--workers", "1", *PARTS)
    return many_words / "tokens"


def workers_of(pid):
    """The processes that were forked from the server which a tool has started for them."""

    def children(pid):
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    return [worker for child in children(pid) for worker in children(child)]


def test_killed_at_any_moment_it_finishes_with_the_same_bytes(many_words, many_undisturbed, tmp_path):
    """Alternately the whole group of processes and the first alone, whose workers must not live on."""
    output, rng = tmp_path / "t", random.Random(3)
    for turn in range(5):
        process = subprocess.Popen(
            command(many_words, output, "--workers", "2", *PARTS), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.time() + 300
        while not (turn == 0 or list(output.glob(".*.tar.partial"))) or not (output / ".parts").is_dir():
            assert process.poll() is None, "finished before it was killed: too little to do"
            assert time.time() < deadline
            time.sleep(0.001)
        time.sleep(rng.random() * 0.4)
        workers = workers_of(process.pid)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if turn % 2 else process.kill()
        process.wait()
        while any(Path(f"/proc/{pid}").exists() and "Z" not in state(pid) for pid in workers):
            assert time.time() < deadline
            time.sleep(0.01)
        assert not (output / "manifest.json").exists()
    run(many_words, output, "--workers", "2", *PARTS)
    assert checksums(output) == checksums(many_undisturbed)
    before = {p: p.stat().st_mtime_ns for p in output.glob("*.tar")}
    run(many_words, output, *PARTS)
    assert {p: p.stat().st_mtime_ns for p in output.glob("*.tar")} == before


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


def test_a_worker_that_is_killed_is_one_clear_message_and_nothing_is_lost(many_words, many_undisturbed, tmp_path):
    process = subprocess.Popen(
        command(many_words, tmp_path / "t", "--workers", "1", *PARTS), stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "t").glob(".*.tar.partial")):
        assert process.poll() is None
        time.sleep(0.001)
    [worker] = workers_of(process.pid)
    os.kill(worker, signal.SIGKILL)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 2
    assert "a worker was killed" in error
    assert "Traceback" not in error
    run(many_words, tmp_path / "t", *PARTS)
    assert checksums(tmp_path / "t") == checksums(many_undisturbed)


def test_a_file_in_parts_holds_the_same_documents_as_in_one(words, undisturbed, tmp_path):
    run(words, tmp_path / "t")
    whole, parts = TokenDataset(tmp_path / "t"), TokenDataset(undisturbed)
    assert [s["name"] for s in whole.shards] == ["a-00000.tar", "b-00000.tar"]
    assert {s["name"].split("-")[1] for s in parts.shards} >= {"p00000", "p00001", "p00002"}

    def texts(dataset):
        return [
            dataset.read(k, d)[0].values.tolist() for k, s in enumerate(dataset.shards) for d in range(s["documents"])
        ]

    assert texts(whole) == texts(parts)
    assert whole.manifest["skipped"] == parts.manifest["skipped"] == {"cannot be read": 2}


def test_submitted_as_an_array_it_writes_the_same_bytes(words, undisturbed, tmp_path):
    pytest.importorskip("submitit", reason="submission is not tested: pip install submitit")
    output = tmp_path / "t"
    array = ("--submit", "local", "--array-size", "2", "--cpus-per-task", "1", "--time", "10")
    said = run(words, output, *PARTS, *array, "--dry-run").stdout
    assert [line.split(":")[0] for line in said.splitlines()[::2]] == ["index", "tokenize", "commit"]
    assert not output.exists()
    run(words, output, *PARTS, *array)
    assert checksums(output) == checksums(undisturbed)
    said = run(words, output, *PARTS, "--submit", "--dry-run", "--partition", "p", "--gpus-per-task", "1").stdout
    assert "tokenize: 8 x 8 cpus, 1 gpus, 1440 min, partition p, array_parallelism 8, dependency afterok" in said


def test_stripes_together_are_the_whole(words, undisturbed, tmp_path):
    for k in (1, 0):
        run(words, tmp_path / "t", *PARTS, "--workers", "1", "--stripe", f"{k}/2")
        assert not (tmp_path / "t/manifest.json").exists()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "t").glob("*.tar")}
    run(words, tmp_path / "t", *PARTS)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "t").glob("*.tar")} == before
    assert checksums(tmp_path / "t") == checksums(undisturbed)
    run(words, tmp_path / "t", *PARTS, "--stripe", "2/2", code=2)


def test_documents_above_a_limit_are_counted_apart_from_unreadable_ones(made, tmp_path):
    # "number 7 of 0, ünïcode" has 22 characters, from number 10 on there are 23
    figures = json.loads(run(made, tmp_path / "t", "--max-characters", "22", "--json").stdout)
    assert (figures["documents"], figures["above_limits"], figures["unreadable"]) == (30, 90, 3)
    manifest = TokenDataset(tmp_path / "t").manifest
    assert manifest["skipped"]["above the limits"] == 90
    skipped = [json.loads(line) for line in (tmp_path / "t/skipped.jsonl").read_text().splitlines()]
    assert "above the limits: 23 characters" in {s["reason"] for s in skipped}


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
    from mom_train.config.files import load_config
    from mom_train.data import build_plans

    other = made / "tokenizers2"
    recipe = made / "recipe2.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "text": {"size": 280}}))
    train = [TOOLS / "train_tokenizers.py", "--config", recipe, "--input", made / "raw"]
    program(*train, "--output", other).check_returncode()
    overrides = [
        f"data.train=[{{path: {tokens}}}]", "data.validation={}", "validation.every=null", f"run_dir={tmp_path}",
        "data.sequence_length=64",
    ]  # fmt: skip
    config = TOOLS.parent / "configs/demo.yaml"
    build_plans(load_config(config, [*overrides, f"tokenizers={made}/tokenizers/tokenizers.yaml"]))
    with pytest.raises(
        ValueError, match=r"text tokenizers differ: .*tokens was made with \w{16}, the run's .*has \w{16}"
    ):
        build_plans(load_config(config, [*overrides, f"tokenizers={other}/tokenizers.yaml"]))


@pytest.fixture(scope="module")
def continuous(made):
    """A folder of tokenizers beside the other: the same text, a KL-VAE with random weights, and no speech."""
    import torch
    from diffusers import AutoencoderKL

    from mom_tokenizers.image.kl import KLImageTokenizer

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
    tool = [TOOLS / "tokenize_shards.py", "--config", folder / "tokenizers.yaml"]
    tool += ["--input", made / "raw", "--output", folder / "tokens", "--workers", "2"]
    refused = program(*tool)
    assert refused.returncode == 2
    # without being told to, nothing is left out: both ways out are named, before anything is tokenized
    assert "the inputs hold speech" in refused.stderr
    assert "--drop-modalities speech" in refused.stderr
    assert "'speech' to the recipe" in refused.stderr
    assert not (folder / "tokens").exists()
    program(*tool, "--drop-modalities", "speech").check_returncode()
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
    from mom_train.config.files import load_config

    config = TOOLS.parent / "configs/demo_transfusion.yaml"

    def resolved(folder, *more, diffusion="{patch_width: 12}"):
        overrides = [f"data.train=[{{path: {folder}}}]", "data.validation={}", f"run_dir={tmp_path}", "tokenizers=null"]
        overrides += ["validation.every=null"]
        overrides += ["data.sequence_length=64", "vocabulary={text: 2048, image: 512, speech: 200}"]
        run_config = load_config(config, [*overrides, f"objective.diffusion={diffusion}", *more])
        from mom_train.data import Datasets, check, training_plan

        datasets = Datasets(run_config)
        training_plan(run_config, datasets)
        return check(run_config, datasets).objective.diffusion

    found = resolved(continuous / "tokens")
    assert (found.latent_scale, found.latent_shift) == (0.7, 0.1)
    found = resolved(continuous / "tokens", diffusion="{patch_width: 12, latent_scale: 2.0}")
    assert (found.latent_scale, found.latent_shift) == (2.0, 0.1)
    with pytest.raises(ValueError, match=r"patches of 12 values, but objective.diffusion.patch_width is\s+16"):
        resolved(continuous / "tokens", diffusion="{patch_width: 16}")
    with pytest.raises(ValueError, match="holds latent patches"):
        resolved(continuous / "tokens", diffusion="null")
    assert resolved(tokens, diffusion="null") is None  # codes: nothing to resolve

    other = tmp_path / "other"
    shutil.copytree(continuous / "tokens", other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizers"]["image"]["latent_scale"] = 0.5
    rewrite_manifest(other, manifest)
    with pytest.raises(ValueError, match=r"latents differ: .*scale 0.7 and shift 0.1, .*other has scale 0.5"):
        resolved(other, f"data.train=[{{path: {continuous / 'tokens'}}}, {{path: {other}}}]")


def test_a_modality_with_a_tokenizer_is_not_dropped(made, tmp_path):
    error = run(made, tmp_path / "t", "--drop-modalities", "speech", code=2).stderr
    assert "has a tokenizer for it" in error
