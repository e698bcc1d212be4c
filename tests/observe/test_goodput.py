"""Goodput: the account of a run's wall time, replayed from records, and of a real run that is killed twice."""

import json
import os
import signal
import time

import pytest

from mom_train.observe.goodput import Account, attempt_files, described, goodput
from mom_train.observe.timeline import Timeline
from tests.helpers.ranks import start_mom_train
from tests.helpers.run_config import write_config

S = 10**9


def account(*lines):
    replayed = Account()
    for line in lines:
        replayed.add(line)
    return replayed.result()


def nonzero(result):
    assert sum(result["parts_ns"].values()) == result["wall_ns"]
    return {part: ns / S for part, ns in result["parts_ns"].items() if ns}


def test_steps_after_the_checkpoint_that_the_next_attempt_goes_on_from_are_repeated():
    result = account(
        {"began": 100 * S, "step": 0},
        {"ns": {"start": 5 * S}},
        {"ns": {"first_step": 3 * S, "train": 8 * S, "data": 1 * S}, "steps": [1, 10]},
        {"ns": {"checkpoints": 2 * S}},
        {"ns": {"train": 7 * S}, "steps": [11, 17]},
        {"began": 140 * S, "step": 10},  # the first attempt was last heard of at 126 s
        {"ns": {"start": 4 * S}},
        {"ns": {"first_step": 1 * S, "train": 6 * S}, "steps": [11, 17]},
        {"ns": {"train": 1 * S}},  # killed in a step
    )
    assert nonzero(result) == {"start": 9, "first_step": 4, "train": 14, "data": 1, "checkpoints": 2, "repeated": 8,
                               "down": 14}  # fmt: skip
    assert result["wall_ns"] == (152 - 100) * S
    assert result["goodput"] == 14 / 52
    assert (result["attempts"], result["from_step"], result["last_step"]) == (2, 0, 17)
    assert "goodput 26.9% of 0.01 h in 2 attempts" in described(result)


def test_a_rollback_repeats_its_steps_whether_they_were_skipped_or_not():
    result = account(
        {"began": 0, "step": 4},
        {"ns": {"train": 6 * S}, "steps": [5, 7]},
        {"ns": {"train": 4 * S}, "steps": [8, 9]},
        {"skipped": [9, 1 * S]},
        {"back_to": 7},
        {"ns": {"train": 5 * S}, "steps": [8, 9]},
        {"skipped": [8, 2 * S]},
    )
    assert nonzero(result) == {"train": 6 + 3, "repeated": 3, "skipped": 1 + 2}


def test_the_queue_is_the_time_from_submission_or_the_last_end_to_the_start_of_the_job():
    result = account(
        {"began": 130 * S, "step": 0, "submitted": 100 * S, "job_began": 120 * S},
        {"ns": {"train": 10 * S}, "steps": [1, 1]},
        {"began": 145 * S, "step": 1, "submitted": 100 * S, "job_began": 120 * S},  # torchrun started it again
        {"ns": {"train": 5 * S}, "steps": [2, 2]},
        {"began": 200 * S, "step": 2, "submitted": 170 * S, "job_began": 190 * S},  # another job
        {"ns": {"train": 5 * S}, "steps": [3, 3]},
        {"began": 230 * S, "step": 3, "submitted": 170 * S, "job_began": 220 * S},  # the same, requeued
    )
    assert nonzero(result) == {"queue": 20 + 20 + 15, "start": 10 + 10 + 10, "train": 20, "down": 5 + 20}
    assert result["wall_ns"] == 130 * S


def test_an_attempt_whose_clock_is_behind_begins_where_the_last_one_ended():
    result = account(
        {"began": 100 * S, "step": 0},
        {"ns": {"train": 10 * S}, "steps": [1, 1]},
        {"began": 105 * S, "step": 1},
        {"ns": {"train": 10 * S}, "steps": [2, 2]},
    )
    assert nonzero(result) == {"train": 20}


def test_a_run_without_records_has_no_goodput_and_damaged_ends_are_left_out(tmp_path):
    assert goodput(tmp_path) is None
    (tmp_path / "goodput").mkdir()
    lines = [{"began": 0, "step": 3}, {"ns": {"train": 2 * S}, "steps": [4, 4]}]
    whole = "".join(f"{json.dumps(line)}\n" for line in lines)
    for number, end in (2, '{"ns": {"tra'), (10, "\0\0\0\n"), (9, ""):
        (tmp_path / f"goodput/attempt-{number}.jsonl").write_text(whole + end)
    found = goodput(tmp_path)
    assert (found["attempts"], found["from_step"]) == (3, 3)
    assert nonzero(found) == {"train": 2, "repeated": 4}


def test_the_recorder_is_in_one_state_at_a_time_and_a_step_that_does_not_end_is_no_training(tmp_path, monkeypatch):
    now = [10 * S]
    monkeypatch.setattr("mom_train.observe.timeline.process_age", lambda: 4 * S)
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    monkeypatch.setattr(time, "time_ns", lambda: 1000 * S + now[0])

    def take(seconds):
        now[0] += round(seconds * S)

    timeline = Timeline(tmp_path, 0)
    take(1)
    for step, seconds in enumerate((9, 0.25, 0.5, 0.125), 1):
        timeline.enter("data")
        take(0.0625)
        timeline.train()
        take(seconds)
        if step == 4:  # the verdict on step 3 comes during step 4
            timeline.skipped()
        timeline.trained(step)
        take(0.03125)
    with timeline.during("validation"):
        take(2)
    with timeline.during("checkpoints"):
        take(3)
    timeline.enter("data")
    timeline.train()
    take(0.75)
    timeline.close()
    result = goodput(tmp_path)
    assert nonzero(result) == {"start": 5, "first_step": 9, "train": 0.25 + 0.125, "skipped": 0.5, "data": 4 / 16,
                               "logging": 4 / 32, "validation": 2, "checkpoints": 3, "repeated": 0.75}  # fmt: skip
    assert json.loads((tmp_path / "goodput.json").read_text()) == result
    assert result["until"] == 1000 + now[0] / S


def test_the_parts_add_up_to_the_wall_time_of_a_run_that_was_killed_twice_and_resumed(tmp_path):
    config = write_config(tmp_path, training__steps=60, checkpoint={"every": 10}, validation={"sequences": 1})
    before = time.time()
    for number, beyond in enumerate((25, 45), 1):
        process = start_mom_train(config, output=tmp_path / f"output-{number}")
        while process.is_alive() and steps(tmp_path / "run") < beyond:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start_mom_train(config, output=tmp_path / "output-3")
    process.join()
    after = time.time()
    assert process.exitcode == 0, (tmp_path / "output-3").read_text()

    files = attempt_files(tmp_path / "run")
    assert [path.name for path in files] == ["attempt-1.jsonl", "attempt-2.jsonl", "attempt-3.jsonl"]
    began = [json.loads(path.read_text().splitlines()[0]) for path in files]
    found = goodput(tmp_path / "run")
    assert sum(found["parts_ns"].values()) == found["wall_ns"]
    # the wall clock that the account was not made from
    assert found["wall_s"] == pytest.approx(found["until"] - began[0]["began"] / S, abs=1e-3)
    ended = json.loads((tmp_path / "run/status.json").read_text())["time"]
    assert before - 0.02 <= began[0]["began"] / S
    committed = (tmp_path / "run/LATEST").stat().st_mtime
    assert committed - 0.02 <= found["until"] <= ended <= after
    assert found["attempts"] == 3
    assert found["last_step"] == 60
    assert all(line["step"] % 10 == 0 and line["step"] > 0 for line in began[1:])
    for part in ("train", "start", "first_step", "data", "validation", "checkpoints", "down"):
        assert found["parts_ns"][part] > 0, part
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert 0 < metrics[-1]["perf/goodput"] < 1


def steps(run_dir):
    path = run_dir / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(whole[-1])["step"] if whole else 0
