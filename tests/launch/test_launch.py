import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mom_data.documents.document import expand_inputs
from mom_train.config.files import _arguments
from mom_train.config.run import RunConfig
from mom_train.config.section import PATH_KEYS, Section
from mom_train.distributed.status import write_status
from tests.helpers import CHECKOUT
from tests.helpers.run_config import tiny_config, write_config
from torchrun_launch.ranks import exit_code, rank_environment
from torchrun_launch.record import this_process, write_record
from torchrun_launch.submit import absolute
from torchrun_launch.watch import describe, status

DRIVER = """
import os, sys
from pathlib import Path
from torchrun_launch.ranks import Agent
agent = Agent(["--standalone", "--nproc-per-node=2", "--max-restarts=1"], [sys.argv[1]], os.environ)
sys.exit(agent.wait(shutdown_timeout=float(sys.argv[2])))
"""
LISTENS = """
import os, signal, sys, time
open("starts", "a").write(os.environ['RANK'])
open(f"begun-{os.environ['RANK']}", "w").write(str(os.getpid()))
time.sleep(2)  # imports, NCCL
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
while not told:
    time.sleep(0.05)
time.sleep(1)  # the checkpoint
open(f"saved-{os.environ['RANK']}", "w").write(str(len(told)))
"""


def launcher(*arguments, code=0):
    command = [sys.executable, "-m", "torchrun_launch", *map(str, arguments)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def until(ready, timeout=300):
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture
def two_ranks(tmp_path):
    """A function that starts torchrun in `tmp_path` with two ranks that run a script, and waits until both have
    begun."""
    started = []

    def start(script, shutdown_timeout=30, driver=""):
        (tmp_path / "rank.py").write_text(script)
        command = [sys.executable, "-c", driver + DRIVER, "rank.py", str(shutdown_timeout)]
        started.append(subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL))
        files = [tmp_path / f"begun-{rank}" for rank in (0, 1)]
        until(lambda: all(f.exists() and f.read_text() for f in files))
        return started[-1], [int(f.read_text()) for f in files]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_reaches_each_rank_once_it_listens_and_waits_until_it_has_saved(two_ranks, tmp_path, number):
    process, _ = two_ranks(LISTENS)
    process.send_signal(number)
    assert process.wait(300) == 0
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


def test_ranks_that_do_not_end_are_killed_when_the_time_is_up(two_ranks):
    process, ranks = two_ranks(LISTENS.replace("time.sleep(1)", "time.sleep(100)"), shutdown_timeout=4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) != 0
    until(lambda: not any(map(alive, ranks)))


def test_a_launcher_that_is_killed_leaves_no_ranks(two_ranks):
    process, ranks = two_ranks(LISTENS)
    process.kill()
    until(lambda: not any(map(alive, ranks)))


def test_a_launcher_that_is_killed_leaves_no_ranks_though_torchrun_does_not_notice(two_ranks):
    process, ranks = two_ranks(
        LISTENS, driver="import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])"
    )
    process.kill()
    until(lambda: not any(map(alive, ranks)))


@pytest.mark.parametrize("code", [2, 3])
def test_an_error_that_would_repeat_is_torchruns_exit_code_and_not_tried_again(two_ranks, tmp_path, code):
    process, _ = two_ranks(LISTENS.replace("time.sleep(2)", f"sys.exit({code} * int(os.environ['RANK']))"))
    assert process.wait(300) == code
    assert sorted((tmp_path / "starts").read_text()) == ["0", "1"]


def test_ranks_that_crash_are_started_again(two_ranks, tmp_path):
    process, _ = two_ranks(LISTENS.replace("time.sleep(2)", "sys.exit(5)"))
    assert process.wait(300) == 1
    assert sorted((tmp_path / "starts").read_text()) == ["0", "0", "1", "1"]


def test_a_rank_whose_torchrun_is_gone_already_does_not_train(tmp_path):
    environment = {
        **os.environ,
        "TORCHELASTIC_RUN_ID": "mom",
        "MOM_AGENT_PID": str(2**22),
    }  # no process has that number
    command = [sys.executable, "-m", "mom_train", str(write_config(tmp_path))]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 1
    assert not (tmp_path / "run").exists()


def test_the_exit_code_says_how_the_run_ended():
    def ended(agent_code, state):
        return exit_code(agent_code, None if state is None else {"state": state})

    assert ended(0, "finished") == ended(0, "stopped") == ended(0, None) == 0
    assert ended(0, "preempted") == 75
    assert ended(2, "failed") == ended(2, None) == 2
    assert ended(3, "failed") == 3
    assert ended(1, "running") == ended(0, "running") == ended(-9, None) == 1


def test_ranks_share_the_cores_and_the_users_settings_stay():
    assert rank_environment(2, 8, {})["OMP_NUM_THREADS"] == "4"
    assert rank_environment(4, 2, {})["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in rank_environment(2, 8, {"OMP_NUM_THREADS": "3"})


def test_status_logs_and_cancel_know_a_local_run(tmp_path):
    config, run_dir = write_config(tmp_path, training__steps=100_000), tmp_path / "run"
    assert "nothing was launched" in launcher("status", run_dir, code=2)
    command = [sys.executable, "-m", "torchrun_launch", "local", "--nproc-per-node", "1", str(config)]
    process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: (run_dir / "metrics.jsonl").exists() and '"step": 3' in (run_dir / "metrics.jsonl").read_text())
        found = json.loads(launcher("status", run_dir, "--json"))
        assert (found["kind"], found["state"], found["pid"]) == ("local", "RUNNING", process.pid)
        assert found["metrics"]["step"] >= 3
        assert found["metrics"]["loss/total"] > 0
        assert f"process {process.pid}" in launcher("local", config, code=2), "two launches would share checkpoints"
        assert "from step 0 of 100000" in launcher("logs", run_dir, "--rank", 0)
        assert launcher("logs", run_dir, "--rank", 1) == ""
        launcher("cancel", run_dir)
        assert process.wait(120) == 75
    finally:
        process.kill()
        process.wait()
    found = json.loads(launcher("status", run_dir, "--json"))
    assert found["state"] == "ENDED"
    assert found["status"]["state"] == "preempted"
    assert (run_dir / "LATEST").read_text() == f"step-{found['status']['step']}\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="a host name of its own needs root")
def test_ranks_of_one_machine_meet_though_its_name_does_not_resolve(tmp_path):
    config = write_config(tmp_path, training__steps=3, validation={"sequences": 1})
    command = [sys.executable, "-m", "torchrun_launch", "local", "--nproc-per-node", "2", str(config)]
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname nowhere.invalid; exec "$@"', "sh"]
    done = subprocess.run([*renamed, *command], cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_batch_script_quotes_what_the_user_gives(tmp_path):
    run_dir = tmp_path / "a run; $(touch harm)"
    given = ["--nodes", 16, "--gpus-per-node", 8, "--account", "my lab", "--time", "2-00:00:00", "--dry-run"]
    given += ["--container-image", "nvcr.io#x", "--sbatch", "mem=0", "--sbatch", "exclusive"]
    config = write_config(tmp_path, training__batch=128)
    script = launcher("submit", *given, config, f"run_dir={run_dir}", "data.lanes=128")
    lines = [shlex.split(line) for line in script.splitlines() if line.startswith("#SBATCH ")]
    options = dict(option.partition("=")[::2] for _, option in lines)
    assert options["--nodes"] == "16"
    assert options["--gpus-per-node"] == "8"
    assert options["--time"] == "2-00:00:00"
    assert options["--account"] == "my lab"
    assert options["--chdir"].startswith(f"{run_dir}/submissions/")
    assert options["--signal"] == "USR2@120"
    assert options.keys() >= {"--requeue", "--mem", "--exclusive"}
    words = shlex.split(next(line for line in script.splitlines() if line.startswith("srun ")))
    assert f"--container-workdir={options['--chdir']}" in words
    assert words[-1].startswith(f"{run_dir}/submissions/")
    assert not run_dir.exists(), "a dry run leaves nothing"


def test_a_sweep_needs_a_folder_for_each_run_and_may_name_it_by_the_config(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name).rename(tmp_path / f"{name}.yaml")
    given = ["submit", "--nodes", 1, "--gpus-per-node", 0, "--dry-run", "--sweep", tmp_path / "*.yaml"]
    said = launcher(*given, "seed=1", f"run_dir={tmp_path}/seed-1/{{config}}")
    assert [line for line in said.splitlines() if line.startswith("# would train")] == [
        f"# would train {tmp_path}/seed-1/{name}" for name in ("one", "two")
    ]
    assert "2 runs need as many" in launcher(*given, f"run_dir={tmp_path}/all", code=2)


def test_a_submitted_config_means_the_same_from_any_folder(tmp_path):
    config = tiny_config(tmp_path, run_dir="runs/x", tokenizers="tokens.yaml")
    url = config.data.train[0].model_copy(update={"path": "s3://bucket/train"})
    near = config.data.train[0].model_copy(update={"path": "tokens/train"})
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": (url, near)})})
    moved = absolute(config)
    here = Path.cwd()
    assert (moved.run_dir, moved.tokenizers) == (here / "runs/x", here / "tokens.yaml")
    assert [source.path for source in moved.data.train] == ["s3://bucket/train", f"{here}/tokens/train"]
    assert moved.model == config.model


def test_patterns_of_raw_documents_mean_the_same_from_any_folder(tmp_path, monkeypatch):
    here = tmp_path / "a [folder]"
    (here / "raw").mkdir(parents=True)
    (here / "raw/a.tar").write_bytes(b"")
    monkeypatch.chdir(here)
    config = tiny_config(tmp_path, tokenizers="tokens.yaml")
    patterns = ("raw", "raw/*.tar", "s3://bucket/raw", "/elsewhere/*.jsonl")
    raw = config.data.train[0].model_copy(update={"path": None, "raw": patterns})
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": (raw,)})})
    [source] = absolute(config).data.train
    monkeypatch.chdir("/")
    folder, glob, *kept = source.raw
    assert expand_inputs([folder]) == expand_inputs([glob]) == [here / "raw/a.tar"]
    assert kept == ["s3://bucket/raw", "/elsewhere/*.jsonl"]


def test_every_text_in_a_config_is_known_to_be_a_place_or_none():
    """A new key that names a place must be made absolute for a submitted job, or it is read from another folder."""
    none = {"architecture", "text", "start", "shape", "project", "entity", "name", "group", "tags", "best", "shards"}
    texts = set()

    def collect(section):
        for key, field in section.model_fields.items():
            inner = [field.annotation, *_arguments(field.annotation)]
            texts.update({key} if str in inner else ())
            for kind in inner:
                if isinstance(kind, type) and issubclass(kind, Section):
                    collect(kind)

    collect(RunConfig)
    by_name = {"vocabulary", "validation", "minimal_pairs"}  # mappings by name
    assert texts - none - by_name == set(PATH_KEYS)


def test_status_of_a_killed_run_names_its_log_and_the_command_to_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_status(tmp_path, "running", 40, 100)
    (tmp_path / "log").write_text("")
    gone = {**this_process(), "born": 0}  # another process than the one that has this number now
    command = ["local", "--nproc-per-node", "2", "a config.yaml"]
    write_record(tmp_path, {"kind": "local", **gone, "logs": str(tmp_path / "log"), "command": command})
    said = describe(status(tmp_path))
    assert "running at step 40 of 100" in said
    assert "ended without a word" in said
    assert f"what it printed: {tmp_path}/log" in said
    assert f"cd {tmp_path} && python -m torchrun_launch local --nproc-per-node 2 'a config.yaml'" in said
    write_status(tmp_path, "finished", 100, 100)
    assert "go on" not in describe(status(tmp_path))


HELPS = """
import contextlib, io, runpy, sys
for program in sys.argv[1:]:
    sys.argv, said = [program, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        assert not end.code and "usage:" in said.getvalue(), program
    else:
        raise AssertionError(program)
"""


def test_every_command_answers_help():
    for command in ("torchrun_launch", "mom_train"):
        names = ("local", "submit", "status", "logs", "cancel") if command == "torchrun_launch" else ()
        for arguments in ([], *([name] for name in names)):
            line = [sys.executable, "-m", command, *arguments, "--help"]
            done = subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "usage:" in done.stdout
    programs = (p for p in sorted((CHECKOUT / "tools").glob("*.py")) if '__name__ == "__main__"' in p.read_text())
    tools = [str(p.relative_to(CHECKOUT)) for p in programs]
    assert "tools/tokenize_shards.py" in tools
    # all in one process, because each would import torch
    done = subprocess.run([sys.executable, "-c", HELPS, *tools], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
