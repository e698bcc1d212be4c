"""Failures while a run trains: which rank reports them, with which exit code, and that a full disk costs no step."""

import errno
import json
import os
import resource
import signal
import socket
import threading
import time
import traceback
from concurrent.futures import Future

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from mom_data.batches import loader
from mom_tokenizers.errors import AgreedError, UserError, exit_clearly, read_json, user_path
from mom_train.checkpoint import store as checkpoint_store
from mom_train.checkpoint.saver import Checkpointer
from mom_train.checkpoint.store import Checkpoints
from mom_train.config.run import CheckpointConfig
from mom_train.distributed import run_lock
from mom_train.distributed.run_lock import RunLock
from mom_train.distributed.status import read_status, write_status
from mom_train.observe.metrics import read_metrics
from tests.helpers.ranks import mom_train_ranks, run_ranks
from tests.helpers.run_config import write_config


def status(folder):
    return json.loads((folder / "run/status.json").read_text())


# ---- one channel for the user's mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(5, "Input/output error", "disk"), KeyError("x")])
def test_only_a_user_error_becomes_a_message_and_everything_else_keeps_its_traceback(error):
    with pytest.raises(type(error)), exit_clearly():
        raise error


@pytest.mark.parametrize(
    ("typed", "named"),
    [("mom plan", "mom plan"), ("tools/plan_run.py", "plan_run.py"), ("/x/mom_train/__main__.py", "mom_train")],
)
def test_a_user_error_is_one_message_with_the_programs_name_and_exit_code_2(typed, named, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [typed, "argument"])
    with pytest.raises(SystemExit) as end, exit_clearly():
        raise UserError("say what")
    assert end.value.code == 2
    assert capsys.readouterr().err == f"{named}: error: say what\n"


def test_what_is_wrong_with_a_path_that_the_user_named_is_said_with_the_path(tmp_path):
    (tmp_path / "half.json").write_text('{"a": ')
    (tmp_path / "latin.json").write_bytes("é".encode("latin-1"))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name, reason in {
        "none.json": "no such file",
        ".": "is a directory",
        "half.json": "not JSON",
        "latin.json": "not UTF-8",
        "deep.json": "not JSON",
    }.items():
        with pytest.raises(UserError, match=reason) as told:
            read_json(tmp_path / name)
        assert str(tmp_path / name) in str(told.value)
    with pytest.raises(OSError, match="Input/output"), user_path(tmp_path):
        raise OSError(5, "Input/output error")  # nothing that a user can mend, and it may pass


def test_a_user_error_in_a_loader_worker_is_the_message_alone(monkeypatch):
    def fails(self, worker=0, workers=1):
        raise UserError("say what")
        yield

    monkeypatch.setattr(loader.PlannedBatches, "made", fails)
    with pytest.raises(UserError, match=r"^say what$"):
        next(loader.batches(None, None, loader.Share(0, 1, 1, 1), workers=1))


# ---- one rank of several -----------------------------------------------------------------------------------------


def out_of_memory_on_rank_1(rank):
    import torch

    from mom_train.passes import Passes

    def fails(self, *arguments):  # before its first collective, in which rank 0 waits
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    if rank == 1:
        Passes.forward_backward = fails


def test_a_rank_that_runs_out_of_memory_in_the_dry_run_says_so_and_ends_the_others_at_once(tmp_path):
    begun = time.monotonic()
    ended = mom_train_ranks(2, out_of_memory_on_rank_1, write_config(tmp_path), "parallel.dry_run=true")
    assert time.monotonic() - begun < 100
    assert [code for code, _ in ended] == [1, 2]
    assert "mom_train: error: [rank 1] a full batch does not fit the memory of rank 1" in ended[1][1]
    assert "Traceback" not in ended[1][1]
    assert "a full batch does not fit the memory of rank 1" in status(tmp_path)["reason"]
    assert status(tmp_path)["state"] == "failed"


def unreadable_on_rank_1(rank):
    from mom_train import data

    def fails(config):
        raise TypeError("a bug of rank 1's")

    if rank == 1:
        data.text_bytes = fails


def test_what_fails_on_one_rank_alone_is_said_there_with_its_rank_and_traceback(tmp_path):
    ended = mom_train_ranks(2, unreadable_on_rank_1, write_config(tmp_path))
    assert [code for code, _ in ended] == [1, 1]
    assert "mom_train: [rank 1] failed:\nTraceback" in ended[1][1]
    assert "RuntimeError: rank 1 failed: TypeError: a bug of rank 1's" in ended[0][1]


def test_what_all_ranks_find_wrong_alike_is_said_by_rank_0_alone(tmp_path):
    ended = mom_train_ranks(3, None, write_config(tmp_path))
    assert [code for code, _ in ended] == [2, 2, 2]
    assert "must be a multiple of training.micro_batch x ranks (1 x 3 = 3)" in ended[0][1]
    assert [said for _, said in ended[1:]] == ["", ""]


def save_with_copies_that_fail(folder):
    """(newest committed step, what is said) after each of three saves; on rank 1 the first one's copy closes its
    stager, as torch 2.11's does, so that the second fails."""
    from torch.distributed.checkpoint._state_dict_stager import StateDictStager

    from mom_train.checkpoint.saver import TrainState
    from tests.helpers.checkpoint_ranks import a_run

    stage = StateDictStager.stage

    def stage_and_close(self, *arguments, **named):
        staged = stage(self, *arguments, **named)
        self.close()
        return staged

    if os.environ["RANK"] == "1":
        StateDictStager.stage = stage_and_close
    happened = []
    with a_run(folder, max_failures=2) as (checkpointer, model, optimizer, ema, change):
        for step in (1, 2, 3):
            change(step)
            checkpointer.save(model, optimizer, ema, TrainState(step=step))
            checkpointer.staged()
            checkpointer.wait()
            happened.append((checkpointer.committed_step, checkpointer._error))
    return happened


def test_a_copy_to_host_memory_that_fails_on_one_rank_is_a_failed_save_on_all(tmp_path):
    first, second = run_ranks(2, save_with_copies_that_fail, str(tmp_path), timeout=120)
    assert first == second
    assert [step for step, _ in first] == [1, 1, 3]
    assert "[rank 1] its tensors could not be copied to host memory: KeyError" in first[1][1]


# ---- a full disk -------------------------------------------------------------------------------------------------


def disk_that_is_full_for_steps_3_to_5(rank):
    """Make the disk full for this process: no file may grow beyond 2 KiB."""
    from mom_train.trainer import Trainer

    advance = Trainer.advance

    def advance_and_fill(self, *arguments):
        advance(self, *arguments)
        full = self.state.step in (3, 4, 5)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    Trainer.advance = advance_and_fill


def disk_that_is_full_from_step_3_on(rank):
    from mom_train.trainer import Trainer

    advance = Trainer.advance

    def advance_and_fill(self, *arguments):
        advance(self, *arguments)
        if self.state.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))

    Trainer.advance = advance_and_fill


def tensorboard_steps(run_dir):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    return sorted({event.step for event in board.Tensors("learning_rate")})


def test_a_full_run_dir_costs_no_step_and_no_figure_and_is_warned_about_once(tmp_path):
    config = write_config(tmp_path, checkpoint={"every": 2})
    [(code, said)] = mom_train_ranks(1, disk_that_is_full_for_steps_3_to_5, config)
    assert code == 0, said
    assert said.count("metrics.jsonl CANNOT BE WRITTEN; training goes on") == 1
    assert said.count("tensorboard CANNOT BE WRITTEN; training goes on") == 1
    assert said.count("can be written again") == 2
    assert said.count("CHECKPOINT FAILED at step 4") == 1
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(9))
    assert lines[-1]["record/failed_writes"] == 6  # two kinds at three steps
    assert tensorboard_steps(tmp_path / "run") == list(range(1, 9))
    assert status(tmp_path)["state"] == "finished"
    assert (tmp_path / "run/LATEST").read_text() == "step-8\n"


def test_a_run_dir_that_stays_full_ends_in_failed_saves_and_status_says_so(tmp_path):
    config = write_config(tmp_path, checkpoint={"every": 2, "max_failures": 3})
    [(code, said)] = mom_train_ranks(1, disk_that_is_full_from_step_3_on, config)
    assert code == 2, said
    assert said.count("CHECKPOINT FAILED") == 3
    assert "3 checkpoints in a row could not be written" in said
    assert "metrics.jsonl lacks everything that was logged after" in said
    assert status(tmp_path)["state"] == "failed"
    assert "could not be written" in status(tmp_path)["reason"]
    assert status(tmp_path)["step"] in (7, 8)


def test_the_state_of_a_run_is_written_over_in_place_where_no_second_file_can_be(tmp_path):
    write_status(tmp_path, "running", 1, 1000)
    size = (tmp_path / "status.json").stat().st_size
    (tmp_path / ".status.partial").mkdir()  # stands for a disk without space
    for reason in ("", "x" * 10_000, "\u1234" * 10_000):
        write_status(tmp_path, "failed", 999, 1000, reason)
        found = read_status(tmp_path)
        assert (found["state"], found["step"]) == ("failed", 999)
        assert reason.startswith(found["reason"].removesuffix("..."))
        assert len(found["reason"]) > 200 or not reason
        assert (tmp_path / "status.json").stat().st_size == size


# ---- one process per run -----------------------------------------------------------------------------------------


def holder(run_dir, ended=None):
    """Start a process that holds the lock until it is killed. Returns its pid."""
    ready, write = os.pipe()
    if (pid := os.fork()) == 0:
        with RunLock(run_dir):
            os.write(write, b"x")
            time.sleep(ended or 60)
        os._exit(0)
    os.read(ready, 1)
    return pid


def test_a_second_process_on_a_run_is_refused_with_the_name_of_the_first_until_that_is_gone(tmp_path):
    pid = holder(tmp_path)
    with pytest.raises(UserError, match=f"process {pid} on {socket.gethostname()} has been training there since"):
        RunLock(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "lock").read_bytes())["pid"] == os.getpid()


def test_what_is_left_of_a_killed_launch_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mom")
    pid = holder(tmp_path, ended=1.0)
    with RunLock(tmp_path):
        os.waitpid(pid, 0)


@pytest.mark.parametrize("lives", [True, False])
def test_a_holder_on_another_machine_counts_as_long_as_it_renews_its_time_stamp(tmp_path, monkeypatch, lives):
    monkeypatch.setattr(run_lock, "_SILENT_SECONDS", 1.5)
    path, stop = tmp_path / "lock", threading.Event()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))

    def renew():
        while lives and not stop.wait(0.2):
            os.utime(path)

    other = threading.Thread(target=renew)
    other.start()
    try:
        if lives:
            with pytest.raises(UserError, match="process 7 on elsewhere"):
                RunLock(tmp_path)
        else:
            with RunLock(tmp_path):
                pass
    finally:
        stop.set()
        other.join()


# ---- a checkpoint that cannot be written -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "raised"),
    [(OSError(errno.ENOSPC, "No space left"), AgreedError), (PermissionError("403"), AgreedError),
     (OSError(errno.EIO, "Input/output error"), RuntimeError), (ConnectionError("the store is away"), RuntimeError)],
)  # fmt: skip
def test_saves_that_fail_in_a_row_end_restartable_unless_the_user_can_mend_the_cause(
    tmp_path, monkeypatch, reason, raised
):
    def save(*_, **__):
        raise CheckpointException("save", {1: (reason, traceback.extract_stack())})

    monkeypatch.setattr(checkpoint_store.dcp, "save", save)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, mine, group=None: found.__setitem__(0, mine))
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    with Checkpointer(Checkpoints(tmp_path), CheckpointConfig(max_failures=1)) as checkpointer:
        copied = Future()
        copied.set_result({})
        checkpointer._thread = threading.Thread(target=checkpointer._write, args=(copied, "{}"))
        checkpointer._thread.start()
        with pytest.raises(raised, match=rf"checkpoint.max_failures=1.*\[rank 1\] .*{reason.args[-1]}"):
            checkpointer.settle()


# ---- what a run left -----------------------------------------------------------------------------------------------


def test_figures_that_are_not_what_was_logged_are_refused_by_file_and_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match=r"metrics.jsonl: no such file"):
        read_metrics(tmp_path)
    path.write_text('{"step": 1}\n{"step": 2, "loss')  # cut short by a crash: the first stands
    assert read_metrics(tmp_path) == [{"step": 1}]
    for damaged in ('{"step"\n', "[1]\n", '{"loss/total": 1.0}\n', '{"step": "2"}\n', '{"step": 2, "loss/x": null}\n'):
        path.write_text('{"step": 1}\n' + damaged)
        with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not"):
            read_metrics(tmp_path)
