"""Checkpoints survive killed processes, full and read-only disks, and flipped bytes, with real ranks and on real S3."""

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from mom_train.distributed.run_lock import RunLock
from tests.helpers.checkpoint_ranks import (
    load_newest,
    save_on_a_bad_disk,
    save_steps,
    save_two_large,
    step_to_carry_on_from,
    train,
)
from tests.helpers.ranks import _rank, free_port, program, run_ranks
from tests.helpers.run_config import tiny_config, write_config
from tests.helpers.runs import assert_equal_tensors, metrics, run


def assert_equal_arrays(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), name


def flip(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def names(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a folder of checkpoints by two ranks, {step: the tensors that were saved})"""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(2, save_steps, str(folder), [1, 2, 3, 4, 5], {"keep": 2, "keep_every": 2})[0]


@pytest.fixture
def copied(saved, tmp_path):
    subprocess.run(["cp", "-r", f"{saved[0]}/.", str(tmp_path)], check=True)
    return tmp_path, saved[1]


def test_a_save_holds_what_the_weights_were_and_loads_on_any_number_of_ranks(saved):
    folder, values = saved
    assert names(folder) == ["step-2", "step-4", "step-5"]  # the last two, and the even ones for good
    assert (folder / "LATEST").read_text() == "step-5\n"
    for world_size in (1, 2, 4):
        for step, loaded in run_ranks(world_size, load_newest, str(folder)):
            assert step == 5
            assert_equal_arrays(loaded, values[5])


def test_stock_torch_reads_our_checkpoints(saved, tmp_path):
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(saved[0] / "checkpoints/step-5", tmp_path / "all.pt")
    stored = torch.load(tmp_path / "all.pt", weights_only=True)
    for name, value in saved[1][5].items():
        kind, name = name.split(".", 1)
        if kind == "optimizer":
            name, leaf = name.rsplit(".", 1)
            stored_value = stored["optimizer"]["state"][name][leaf]
        else:
            stored_value = stored[kind][name]
        assert np.array_equal(stored_value.numpy(), value), name


def test_a_damaged_checkpoint_is_passed_over_and_when_none_is_left_the_files_are_named(copied):
    folder, values = copied
    flip(folder / "checkpoints/step-5/__1_0.distcp")
    for step, loaded in run_ranks(2, load_newest, str(folder)):
        assert step == 4
        assert_equal_arrays(loaded, values[4])
    assert (folder / "LATEST").read_text() == "step-4\n"
    flip(folder / "checkpoints/step-4/.metadata")
    (folder / "checkpoints/step-2/__0_0.distcp").unlink()
    for said in run_ranks(2, load_newest, str(folder)):
        assert f"{folder}/checkpoints/step-4/.metadata has crc32" in said
        assert f"{folder}/checkpoints/step-2/__0_0.distcp is missing" in said
        assert "step-5" not in said  # the run knows that one


def test_a_rank_killed_in_the_middle_of_a_save_leaves_the_older_checkpoint(tmp_path):
    context = multiprocessing.get_context("forkserver")
    results, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=_rank, args=(r, 2, port, save_two_large, (str(tmp_path),), results), daemon=True)
        for r in range(2)
    ]
    for process in ranks:
        process.start()
    unfinished = tmp_path / "checkpoints/step-2"
    deadline = time.time() + 300
    while not (unfinished / "__1_0.distcp").exists():
        assert time.time() < deadline
        assert all(p.is_alive() for p in ranks)
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert results.get(timeout=300) == (0, True, 1)  # the other one knows that the save failed
    for process in ranks:
        process.join(300)
    assert not (unfinished / ".metadata").exists()
    assert (tmp_path / "LATEST").read_text() == "step-1\n"
    assert (unfinished / "__1_0.distcp").exists()
    assert run_ranks(2, step_to_carry_on_from, str(tmp_path)) == [1, 1]  # removes what is left of it
    assert names(tmp_path) == ["step-1"]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small tmpfs here, so a full disk is NOT tested: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_or_read_only_disk_costs_checkpoints_and_not_the_run(small_disk):
    first, second = run_ranks(2, save_on_a_bad_disk, str(small_disk))
    assert first == second  # all ranks know the same
    assert first[0::2][:4] == [(1, 1, "step-1\n"), (2, 1, "step-1\n"), (3, 3, "step-3\n"), (4, 3, "step-3\n")]
    assert first[1::2][:3] == [["step-1"], ["step-1"], ["step-1", "step-3"]]
    assert "2 checkpoints in a row could not be written (checkpoint.max_failures=2)" in first[-1]
    assert "Read-only file system" in first[-1]


def test_a_run_whose_checkpoints_fail_goes_on_and_then_ends_with_exit_code_2(small_disk, tmp_path):
    (small_disk / "filler").write_bytes(bytes(8 * 2**20 - 200_000))
    where = {"path": str(small_disk), "every": 2, "max_failures": 2}
    said = run(write_config(tmp_path, checkpoint=where), ranks=0, code=2)
    assert said.count("CHECKPOINT FAILED") == 2
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert metrics(tmp_path / "run")[-1]["step"] >= 4  # it trained on after the first failure


def evil(path):
    """A pickle that would make the file `path` if it were unpickled."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(path),)

    return Evil()


def with_sums(folder):
    """Make checksums.json agree with the files that are there, as somebody who had planted them would."""
    content = {
        p.name: {"size": p.stat().st_size, "crc32": zlib.crc32(p.read_bytes())}
        for p in folder.iterdir()
        if p.name != "checksums.json"
    }
    (folder / "checksums.json").write_text(json.dumps(content))


def test_a_checkpoint_cannot_run_code(copied, tmp_path):
    import torch
    import torch.distributed.checkpoint as dcp

    from mom_train.checkpoint.store import Checkpoints

    folder = copied[0] / "checkpoints/step-5"
    planted = tmp_path / "planted"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = evil(planted)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with_sums(folder)
    dcp.FileSystemReader(folder).read_metadata()
    assert planted.exists(), "torch itself runs it: the test means something"
    planted.rmdir()
    checkpoint = Checkpoints(copied[0])[5]
    for action in (checkpoint.metadata, lambda: checkpoint.load({"model": {"norm.weight": torch.zeros(32)}}, True)):
        with pytest.raises(ValueError, match=r"asks for posix\.mkdir"):
            action()
    assert "asks for posix.mkdir" in run_ranks(1, load_newest, str(copied[0]))[0]
    assert not planted.exists()

    other = copied[0] / "checkpoints/step-4"  # a value that is a pickle, in an index that is fine
    subprocess.run(["rm", "-r", other], check=True)
    with contextlib.suppress(Exception):
        dcp.save({"model": {"norm.weight": evil(planted)}}, checkpoint_id=other, no_dist=True)
    metadata = pickle.loads((other / ".metadata").read_bytes())
    metadata.storage_meta = None  # a path, which ours do not hold
    (other / ".metadata").write_bytes(pickle.dumps(metadata))
    with_sums(other)
    dcp.load({"model": {"norm.weight": 0}}, checkpoint_id=other, no_dist=True)
    assert planted.exists(), "torch itself runs it: the test means something"
    planted.rmdir()
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' is not a tensor but a pickle"):
        Checkpoints(copied[0])[4].load({"model": {"norm.weight": 0}}, True)
    assert not planted.exists()


def test_checkpoints_go_to_s3_and_come_back(tmp_path):
    moto_server = pytest.importorskip("moto.server", reason="moto is not installed: s3:// is NOT tested")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed: s3:// is NOT tested")
    server = moto_server.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environment = {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }
        s3 = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )
        s3.create_bucket(Bucket="runs")

        def keys():
            return sorted(entry["Key"] for entry in s3.list_objects_v2(Bucket="runs").get("Contents", ()))

        url = "s3://runs/mine"
        values = run_ranks(2, save_steps, url, [1, 2, 3], {"keep": 2}, environment)[0]
        files = ("checksums.json", "train_state.json", ".metadata", "__0_0.distcp", "__1_0.distcp")
        assert keys() == sorted(
            ["mine/LATEST", *(f"mine/checkpoints/step-{step}/{name}" for step in (2, 3) for name in files)]
        )
        [(step, loaded)] = run_ranks(1, load_newest, url, environment)
        assert step == 3
        assert_equal_arrays(loaded, values[3])

        key = "mine/checkpoints/step-3/__0_0.distcp"
        content = bytearray(s3.get_object(Bucket="runs", Key=key)["Body"].read())
        content[-1000] ^= 1
        s3.put_object(Bucket="runs", Key=key, Body=bytes(content))
        for step, loaded in run_ranks(2, load_newest, url, environment):
            assert step == 2
            assert_equal_arrays(loaded, values[2])
        assert s3.get_object(Bucket="runs", Key="mine/LATEST")["Body"].read() == b"step-2\n"
    finally:
        server.stop()


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run with an average of its weights and a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("averaged")
    config = tiny_config(folder, **AVERAGED)
    run_ranks(1, train, config)
    return folder


AVERAGED = {
    "training": {"steps": 5, "batch": 4, "micro_batch": 1, "ema_decay": 0.25},
    "checkpoint": {"every": 1, "keep": 2, "keep_every": 1},
    "validation": {"every": 1, "sequences": 5, "ema": True},
}


def weights_of(run_dir, step):
    """The tensors of a checkpoint, read by torch's own converter."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    out = run_dir / f"weights-{step}.pt"
    dcp_to_torch_save(run_dir / f"checkpoints/step-{step}", out)
    return torch.load(out, weights_only=True)


def test_the_average_follows_its_formula(averaged):
    before = weights_of(averaged / "run", 1)
    for step in range(2, 6):
        after = weights_of(averaged / "run", step)
        decay = min(0.25, (1 + step) / (10 + step))
        for name, weight in after["model"].items():
            expected = decay * before["ema"][name].double() + (1 - decay) * weight.double()
            assert np.abs((after["ema"][name] - expected).numpy()).max() < 1e-6, name
        before = after


def test_validating_the_average_changes_its_losses_and_nothing_else(averaged, tmp_path):
    changed = AVERAGED | {"validation": {"every": 1, "sequences": 5}}
    config = tiny_config(averaged, **changed, run_dir=str(tmp_path / "run"))
    run_ranks(1, train, config)
    with_average, without = metrics(averaged / "run"), metrics(tmp_path / "run")
    for a, b in zip(with_average, without, strict=True):
        for key in a:
            # before the first step the average is the weights
            assert (a[key] == b[key]) == (not key.startswith("val/") or a["step"] == 0), (a["step"], key)


def test_a_run_with_an_average_resumes_bit_for_bit(averaged, tmp_path):
    config = tiny_config(averaged, **AVERAGED, run_dir=str(tmp_path / "run"))
    part = config.model_copy(update={"training": config.training.model_copy(update={"stop_at": 2})})
    run_ranks(1, train, part)
    run_ranks(1, train, config)
    assert metrics(tmp_path / "run") == metrics(averaged / "run")
    assert_equal_tensors(weights_of(tmp_path / "run", 5), weights_of(averaged / "run", 5))


def test_checkpoints_by_the_clock(averaged, tmp_path):
    config = tiny_config(averaged, run_dir=str(tmp_path / "run"), checkpoint={"seconds": 1e-9, "keep": 99})
    run_ranks(2, train, config)
    assert {"step-1", "step-8"} <= set(names(tmp_path / "run"))


def tool(*arguments, code=0):
    done = program("tools/checkpoint.py", *arguments)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stdout + done.stderr


def test_the_tool_lists_verifies_prunes_and_exports(averaged, tmp_path):
    from safetensors.numpy import load_file

    subprocess.run(["cp", "-r", averaged / "run", tmp_path / "run"], check=True)
    folder = tmp_path / "run"
    state = json.loads((folder / "checkpoints/step-5/train_state.json").read_text())
    (folder / "BEST").write_text("step-4\n")
    listed = json.loads(tool(folder, "list", "--json"))
    assert [(e["step"], e["committed"], e["permanent"], e["latest"], e["best"]) for e in listed] == [
        (step, True, True, step == 5, step == 4) for step in range(1, 6)
    ]
    assert state["step"] == 5
    for e in listed:
        assert e["bytes"] == sum(p.stat().st_size for p in Path(e["path"]).iterdir())

    tool(folder, "export", "--out", tmp_path / "out", "--step", 3, "--ema")
    exported, stored = load_file(tmp_path / "out/model.safetensors"), weights_of(averaged / "run", 3)
    assert_equal_arrays(exported, {name: value.numpy() for name, value in stored["ema"].items()})

    flip(folder / "checkpoints/step-2/__0_0.distcp")
    assert "step-2/__0_0.distcp has crc32" in tool(folder, "verify", code=2)
    (folder / "checkpoints/step-3/.metadata").unlink()
    kept = {"config": {"checkpoint": {}, "run_dir": str(tmp_path / "elsewhere")}}
    (folder / "checkpoints/step-5/train_state.json").write_text(json.dumps(state | kept))
    (folder / "checkpoints/step-9").touch()  # somebody's file is no checkpoint
    (tmp_path / "elsewhere").mkdir()
    with RunLock(tmp_path / "elsewhere"):  # the checkpoint says where its run trains
        assert f"elsewhere: process {os.getpid()} on" in tool(folder, "prune", "--keep", 2, code=2)
    assert "step-3" in tool(folder, "prune", "--keep", 2)
    assert names(folder) == ["step-4", "step-5", "step-9"]
