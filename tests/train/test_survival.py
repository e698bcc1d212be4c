"""What a run does about bad steps, a time limit and a changed mix of sources, by the public command as a process."""

import json

import numpy as np
import pytest

from tests.helpers.corpus import random_document, write_dataset
from tests.helpers.ranks import mom_train
from tests.helpers.run_config import write_config

DIFFUSION = {"diffusion": {"patch_width": 4}, "z_loss": 1e-4}


def run(config, *overrides, code=0):
    ended, said = mom_train(config, "data.workers=0", *overrides)
    assert ended == code, said[-3000:]
    return said


def lines(folder):
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def status(folder):
    return json.loads((folder / "run/status.json").read_text())


def latents_with_nan(bad):
    """A function that makes documents with a picture each. Those numbered `bad` hold one value that is not a number."""
    made = iter(range(10**6))

    def make(rng, latent_width):
        number = next(made)
        document = [s for s in random_document(rng, 4) if s.modality != 1]
        picture = next(s for _ in range(10**6) for s in random_document(rng, 4) if s.modality == 1)
        if number in bad:
            picture.values[3, 2] = np.nan
        return [*document, picture]

    return make


def test_a_bad_step_is_skipped_and_named_and_the_run_goes_on(tmp_path):
    write_dataset(
        tmp_path / "train", documents=120, shards=2, seed=1, latent_width=4, make=latents_with_nan({10, 40, 70})
    )
    write_dataset(tmp_path / "val", documents=30, shards=1, seed=2, latent_width=4)
    config = write_config(tmp_path, objective=DIFFUSION, training__steps=24)
    said = run(config)
    named = [line for line in said.splitlines() if "BAD STEP" in line]
    assert named
    assert all("patches, z-loss not finite on rank 0" in line for line in named)
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == list(range(25))
    skipped = [0] + [line["anomaly/skipped"] for line in logged[1:]]
    bad = [step for step in range(1, 25) if skipped[step] > skipped[step - 1]]
    assert bad
    assert [f"BAD STEP {step}," in said for step in range(1, 25)] == [step in bad for step in range(1, 25)]
    step = bad[0]
    for n in bad:
        assert not {"loss/image", "loss/total"} & logged[n].keys(), "JSON has no such number"
    assert all({"loss/total", "z_loss"} <= logged[n].keys() for n in range(1, 25) if n not in bad)
    assert status(tmp_path)["state"] == "finished"
    # the same with a stop just behind the bad step: what it is judged by is in the checkpoint
    again = write_config(tmp_path, objective=DIFFUSION, training__steps=24, run_dir=str(tmp_path / "again"))
    run(again, f"training.stop_at={step}")
    run(again)
    whole = [{k: v for k, v in line.items() if not k.startswith(("perf/", "checkpoint/"))} for line in logged]
    halves = [json.loads(line) for line in (tmp_path / "again/metrics.jsonl").read_text().splitlines()]
    halves = [{k: v for k, v in line.items() if not k.startswith(("perf/", "checkpoint/", "val/"))} for line in halves]
    assert halves == [{k: v for k, v in line.items() if not k.startswith("val/")} for line in whole]


def test_steps_that_stay_bad_are_gone_back_from_and_in_the_end_reported(tmp_path):
    """Every document of the second source is bad, and the run reads the first of them at its sequence 16."""
    write_dataset(tmp_path / "train", documents=120, shards=2, seed=1, latent_width=4)
    write_dataset(tmp_path / "val", documents=30, shards=1, seed=2, latent_width=4)
    write_dataset(tmp_path / "bad", documents=60, shards=1, seed=3, latent_width=4, make=latents_with_nan(range(60)))
    common = {"objective": DIFFUSION, "training__steps": 24, "checkpoint": {"every": 2}, "data__pack_window": 8}
    config = write_config(tmp_path, **common, anomaly={"skips": 2, "rollbacks": 1})
    run(config, "training.stop_at=4")
    mix = f"data.train=[{{path: {tmp_path}/train}}, {{path: {tmp_path}/bad, weight: 50}}]"
    assert "data.new_phase=true" in run(config, mix, code=2)
    said = run(config, mix, "data.new_phase=true", code=3)
    assert "2 bad steps in a row: back to step" in said
    assert status(tmp_path)["state"] == "failed"
    assert "incident.json" in status(tmp_path)["reason"]
    incident = json.loads((tmp_path / "run/incident.json").read_text())
    first, second = incident["bad"]
    assert second["step"] == first["step"] + 1
    [rollback] = incident["rollbacks"]
    assert rollback["step"] < first["step"]
    for bad in (first, second, *rollback["bad"]):
        [rank] = bad["ranks"]
        assert "patches" in rank["not_finite"]
        assert any(name.startswith(f"{tmp_path}/bad/part-00000.tar#") for name in rank["documents"])
    # with a mix that is sound again it goes on from there, behind the bad data
    said = run(config, "data.new_phase=true", f"data.train=[{{path: {tmp_path}/train}}]", "data.max_bad_fraction=1")
    assert status(tmp_path)["state"] == "finished"
    assert lines(tmp_path)[-1]["step"] == 24


def test_a_run_whose_time_is_up_is_preempted_and_goes_on_as_if_nothing_had_been(tmp_path):
    config = write_config(tmp_path, training__steps=400, checkpoint={"every": 100}, validation={"sequences": 1})
    run(config, "training.time_limit=5", code=75)
    now = status(tmp_path)
    assert now["state"] == "preempted"
    assert "time_limit" in now["reason"]
    assert 0 <= now["step"] < 400
    assert (tmp_path / "run/LATEST").read_text() == f"step-{now['step']}\n"
    run(config, f"training.stop_at={now['step'] + 3}")
    assert status(tmp_path)["state"] == "stopped"
    undisturbed = write_config(tmp_path, training__steps=400, run_dir=str(tmp_path / "other"))
    run(undisturbed, f"training.stop_at={now['step'] + 3}", "validation.sequences=1")
    whole = [json.loads(line) for line in (tmp_path / "other/metrics.jsonl").read_text().splitlines()]
    keys = ("loss/total", "loss/text", "grad_norm/total", "grad_norm/image", "flops/total")
    assert [[a.get(k) for k in keys] for a in lines(tmp_path)] == [[b.get(k) for k in keys] for b in whole]


def test_a_full_batch_is_tried_before_the_first_step_and_changes_nothing(tmp_path):
    config = write_config(tmp_path, objective=DIFFUSION)
    write_dataset(tmp_path / "a", documents=60, shards=1, seed=1, latent_width=4)
    common = [f"data.train=[{{path: {tmp_path}/a}}]", "data.validation={}", "training.stop_at=3"]
    run(config, *common)
    run(config, *common, f"run_dir={tmp_path}/tried", "parallel.dry_run=true")
    tried = [json.loads(line) for line in (tmp_path / "tried/metrics.jsonl").read_text().splitlines()]
    assert [line["loss/total"] for line in tried] == [line["loss/total"] for line in lines(tmp_path)]
    assert [line["grad_norm/total"] for line in tried] == [line["grad_norm/total"] for line in lines(tmp_path)]


@pytest.mark.parametrize("change", ["data.pack_window=8", "data.packing=concatenate", "data.shuffle_units=2"])
def test_a_run_takes_another_packing_on_as_a_phase_and_says_so_in_its_checkpoint(tmp_path, change):
    config = write_config(tmp_path)
    run(config, "training.stop_at=3")
    run(config, change, "data.new_phase=true", "training.stop_at=5")
    run(config, change, "data.new_phase=true")  # the same phase goes on
    state = json.loads((tmp_path / "run/checkpoints/step-8/train_state.json").read_text())
    assert [phase["since"] for phase in state["phases"]] == [0, 12]
    assert state["lanes"].keys() == {"0", "1"}
    assert "another run_dir" in run(config, change, "data.new_phase=true", "seed=9", code=2)
