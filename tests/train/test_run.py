"""The public commands as processes: they train, resume and stop, and say what is wrong with bad input."""

import os
import signal
import subprocess
import time

import numpy as np
import pytest
import yaml

from tests.helpers import CHECKOUT
from tests.helpers.run_config import tiny_config, write_config
from tests.helpers.runs import assert_equal_tensors, command, metrics, run, weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run over two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    run(write_config(folder), torchrun=True)
    return folder


def test_a_run_leaves_what_it_promises(whole):
    run_dir = whole / "run"
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(9))
    assert lines[0].keys() >= {"val/held/loss/text", "val/held/loss/image", "val/held/loss/speech"}
    for key in ("loss/total", "loss/text", "loss/image", "loss/speech", "grad_norm/total", "flops/total"):
        assert all(np.isfinite(line[key]) for line in lines[1:]), key
    assert lines[8]["loss/total"] < lines[1]["loss/total"]
    assert lines[8]["val/held/loss/total"] < lines[0]["val/held/loss/total"]
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["training"]["steps"] == 8
    assert (run_dir / "LATEST").read_text() == "step-8\n"

    from mom_train.cost.flops import training_flops_per_token

    config = tiny_config(whole)
    tokens = sum(lines[8][f"tokens/{m}"] for m in ("text", "image", "speech"))
    assert lines[8]["flops/total"] == tokens * training_flops_per_token(config.model, 192)
    assert tokens <= 8 * 4 * 128

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    for name in ("loss/text", "val/held/loss/image", "flops/total"):
        shown = {e.step: e.value for e in board.Scalars(name)}
        assert shown == pytest.approx({line["step"]: line[name] for line in lines if name in line}, rel=1e-6)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, tmp_path):
    config = write_config(tmp_path, data__train=[{"path": str(whole / "train")}], validation={"sequences": 5})
    values = yaml.safe_load(config.read_text())
    values["data"]["validation"] = {"held": [{"path": str(whole / "val")}]}
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    run(config, "training.stop_at=3")
    assert (tmp_path / "run/LATEST").read_text() == "step-3\n"
    run(config)

    def comparable(lines):  # validation also ran at step 3, where the first part ended
        return [{k: v for k, v in line.items() if not (k.startswith("val/") and line["step"] == 3)} for line in lines]

    assert comparable(metrics(tmp_path / "run")) == comparable(metrics(whole / "run"))
    assert_equal_tensors(weights(tmp_path / "run"), weights(whole / "run"))


def test_a_run_resumes_on_another_number_of_ranks_with_the_same_documents(whole, tmp_path):
    config = write_config(tmp_path, data__train=[{"path": str(whole / "train")}])
    run(config, "training.stop_at=4", ranks=1)
    run(config, ranks=4)
    ours, theirs = metrics(tmp_path / "run"), metrics(whole / "run")
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert a["tokens/text"] == b["tokens/text"]
        assert a["loss/total"] == pytest.approx(b["loss/total"], rel=1e-4)


def test_a_signal_ends_the_run_with_a_checkpoint_that_carries_on_exactly(whole, tmp_path):
    config = write_config(tmp_path, data__train=[{"path": str(whole / "train")}], training__steps=2000)
    process = subprocess.Popen(command(config), cwd=CHECKOUT, stderr=subprocess.DEVNULL)
    try:
        log = tmp_path / "run/metrics.jsonl"
        deadline = time.time() + 300
        while not (log.exists() and len(log.read_text().splitlines()) > 4):
            assert time.time() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        process.wait(300)
    finally:
        process.kill()
    stopped = int((tmp_path / "run/LATEST").read_text().strip().removeprefix("step-"))
    assert metrics(tmp_path / "run")[-1]["step"] == stopped
    run(config, f"training.stop_at={stopped + 2}")
    run(config, f"run_dir={tmp_path}/straight", f"training.stop_at={stopped + 2}")
    resumed, straight = metrics(tmp_path / "run"), metrics(tmp_path / "straight")
    for a, b in zip(resumed, straight, strict=True):
        shared = a.keys() & b.keys()
        assert {k: a[k] for k in shared} == {k: b[k] for k in shared}


def test_one_process_needs_no_torchrun(whole, tmp_path):
    config = write_config(tmp_path, data__train=[{"path": str(whole / "train")}], training__steps=3)
    run(config, ranks=0)
    assert metrics(tmp_path / "run")[1]["loss/total"] == pytest.approx(
        metrics(whole / "run")[1]["loss/total"], rel=1e-5
    )


def test_validation_and_checkpoints_come_when_due_whatever_the_logging(whole, tmp_path):
    config = write_config(
        tmp_path, log_every=4, checkpoint={"every": 3, "keep": 9}, validation={"every": 5, "sequences": 2}
    )
    run(config, ranks=0)
    lines = {line["step"]: line for line in metrics(tmp_path / "run")}
    assert list(lines) == [0, 3, 4, 5, 6, 8]
    assert [s for s, line in lines.items() if "val/held/loss/text" in line] == [0, 5, 8]
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-3", "step-6", "step-8"]


def test_each_error_of_the_user_is_one_clear_message_and_exit_code_2(whole, tmp_path):
    config = write_config(tmp_path)

    def says(*overrides, **how):
        error = run(config, *overrides, code=2, **({"ranks": 0} | how))
        assert "Traceback" not in error, error
        return error

    assert "model.layer: unknown key; did you mean 'layers'?" in says("model.layer=3")
    assert "must be a multiple of training.micro_batch x ranks (1 x 3 = 3)" in says(ranks=3, torchrun=True)

    short = tmp_path / "train/part-00001.tar"
    content = short.read_bytes()
    short.write_bytes(content[:-512])
    assert "part-00001.tar has" in says(ranks=2)
    short.unlink()
    assert "part-00001.tar is missing" in says()
    short.write_bytes(content)

    run(config, "training.stop_at=1", ranks=0)
    before = sorted((tmp_path / "run").rglob("*"))
    assert "use another run_dir for another model" in says("model.dim=64", "optimizer.warmup=1")
    assert "data.lanes: 2 -> 1\nRestore that; or" in says("data.lanes=1")
    (tmp_path / "run/LATEST").write_text("step-7\n")
    assert "Committed: step-1" in says()
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_too_many_damaged_documents_stop_every_rank_with_a_message(tmp_path):
    config = write_config(tmp_path, data__max_bad_fraction=0.0)
    shard = tmp_path / "train/part-00000.tar"
    content = bytearray(shard.read_bytes())
    for at in range(2000, len(content) - 2000, 97):
        content[at] ^= 0x55
    shard.write_bytes(content)
    error = run(config, code=2)
    assert "did not match their checksums" in error
    assert "Traceback" not in error
