"""Decay branches: a run that begins from everything another run had at one step."""

import json
import sys

import pytest

from mom_tools.model.branch import main
from tests.helpers.ranks import program
from tests.helpers.run_config import write_config
from tests.helpers.runs import assert_equal_tensors, metrics, run, weights

STABLE = {"learning_rate": 0.01, "warmup": 2, "schedule": "constant"}
TRAINING = {"steps": 9, "batch": 2, "micro_batch": 1, "ema_decay": 0.9}
DECAY = ("optimizer.schedule=wsd", "optimizer.decay=3", "optimizer.decay_shape=sqrt")


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trunk")
    config = write_config(folder, optimizer=STABLE, training=TRAINING, checkpoint={"keep_every": 5})
    run(config, "data.validation={}", ranks=0)
    return folder


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_branch_equals_the_run_that_had_its_decay_planned_from_the_start(trunk, tmp_path):
    planned = write_config(tmp_path, run_dir=str(tmp_path / "planned"), optimizer=STABLE, training=TRAINING,
                           data__train=[{"path": str(trunk / "train")}])  # fmt: skip
    run(planned, *DECAY, "training.steps=8", "data.validation={}", ranks=0)
    before, branch = files(trunk / "run/checkpoints"), tmp_path / "branch"
    command = ("mom_tools.model.branch", trunk / "run", "--at", 5, "--decay", 3, "--shape", "sqrt", f"run_dir={branch}")
    for more in (["training.stop_at=6"], []):  # interrupted after its first step, and carried on with
        ended = program(*command, *more)
        assert ended.returncode == 0, ended.stderr
    assert metrics(branch)[-3:] == metrics(tmp_path / "planned")[-3:]  # losses, norms, rates, tokens and FLOPs
    assert_equal_tensors(weights(branch), weights(tmp_path / "planned"))
    states = [
        json.loads((r / "checkpoints/step-8/train_state.json").read_text()) for r in (branch, tmp_path / "planned")
    ]
    assert all(states[0][key] == states[1][key] for key in ("step", "sequence", "tokens", "flops", "lanes", "judge"))
    assert states[0]["config"]["branch"] == {"run": str(trunk / "run"), "step": 5}
    assert files(trunk / "run/checkpoints") == before


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mom branch", *map(str, arguments)])
    main()


def test_a_branch_that_was_only_written_does_not_need_the_trunks_checkpoint_any_more(
    trunk, tmp_path, monkeypatch, capsys
):
    call(monkeypatch, trunk / "run", "--at", 5, "--decay", 2, f"run_dir={tmp_path / 'b'}", "--write-only")
    assert "mom train" in capsys.readouterr().out
    ours, theirs = tmp_path / "b/checkpoints/step-5", trunk / "run/checkpoints/step-5"
    assert files(ours) == files(theirs)
    assert (tmp_path / "b/LATEST").read_text() == "step-5\n"
    with pytest.raises(SystemExit) as ended:  # it would go on with another shape than it was begun with
        call(monkeypatch, trunk / "run", "--at", 5, "--decay", 2, "--shape", "sqrt", f"run_dir={tmp_path / 'b'}")
    assert ended.value.code == 2
    assert "was begun with --shape linear, and this is --shape sqrt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--at", 4, "--decay", 3, "run_dir=NEW"), "has no checkpoint of step 4; there are: 5, 9"),
        (("--at", 5, "--decay", 0, "run_dir=NEW"), "--decay 0: at least 1"),
        (("--at", 5, "--decay", 3), "run_dir=...: name the folder of the branch"),
        (("--at", 5, "--decay", 3, "run_dir=TRUNK"), "is the folder of another run"),
        (
            ("--at", 5, "--decay", 3, "run_dir=NEW", "training.steps=99"),
            "training.steps: --at, --decay and --shape decide",
        ),
    ],
)
def test_what_cannot_be_branched_is_one_message(trunk, tmp_path, monkeypatch, capsys, arguments, message):
    places = {"run_dir=NEW": f"run_dir={tmp_path / 'new'}", "run_dir=TRUNK": f"run_dir={trunk / 'run'}"}
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, trunk / "run", *(places.get(a, a) for a in arguments))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("optimizer", "step", "message"),
    [
        ({**STABLE, "warmup": 6}, 5, "in its warm-up until step 6"),
        ({**STABLE, "schedule": "cosine"}, 5, "falls along a cosine from step 2 on"),
        ({**STABLE, "schedule": "wsd", "decay": 5}, 5, "falls from step 4 on"),
    ],
)
def test_a_step_at_which_the_rate_is_not_stable_is_refused(tmp_path, optimizer, step, message):
    from mom_tokenizers.errors import UserError
    from mom_tools.model.branch import check_stable
    from tests.helpers.run_config import tiny_config

    with pytest.raises(UserError, match=message):
        check_stable(tiny_config(tmp_path, optimizer=optimizer, training=TRAINING), step)
