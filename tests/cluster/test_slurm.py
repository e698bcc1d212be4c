"""Training jobs on a real Slurm, through the launcher's own commands."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import CHECKOUT

LONG = 100_000  # steps: more than any test waits for
PATIENCE = 900  # seconds; what is waited for comes in seconds on a quiet machine


@pytest.fixture
def cluster(slurm, tiny, tmp_path):
    """The cluster with the folder and the config of one run. Jobs that a test has left are cancelled at its end."""
    until(lambda: len(slurm.idle()) == 3)
    made = Cluster(slurm, tiny, tmp_path)
    yield made
    for path in sorted(tmp_path.glob("**/jobs/*_log.out")):  # pytest shows it where the test has failed
        print(f"--- {path.name}\n{path.read_text()[-3000:]}")
    slurm.client("scancel", "-u", "root")
    until(lambda: not slurm.client("squeue", "-h").stdout.strip())


class Cluster:
    def __init__(self, slurm, tiny, folder):
        self.slurm, self.config, self.folder = slurm, tiny / "config.yaml", folder
        self.run_dir = folder / "the run"

    def launcher(self, *arguments, code=0):
        command = [sys.executable, "-m", "torchrun_launch", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=CHECKOUT, env=self.slurm.environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def submit(self, *options, steps, nodes=2):
        """Submit a job that trains `steps` steps. Returns the number of the job."""
        given = ["--nodes", nodes, "--gpus-per-node", 0, "--cpus-per-task", 1, *options]
        changes = [f"run_dir={self.run_dir}", f"training.steps={steps}", "checkpoint.every=10"]
        out = self.launcher("submit", *given, self.config, *changes)
        return out.split()[1]

    def status(self):
        return json.loads(self.launcher("status", self.run_dir, "--json"))

    def step(self):
        """The last step that is logged, or 0."""
        return max(self.steps(), default=0)

    def until(self, ready):
        """Wait until `ready()` is true. Fails at once where the job has given up."""
        until(lambda: ready() or self.given_up())
        assert ready(), f"the job was given up: {self.given_up()}"

    def given_up(self):
        decisions = (json.loads(p.read_text()) for p in self.run_dir.glob("submissions/*/attempt-*/decision.json"))
        return [d["verdict"] for d in decisions if d["verdict"].startswith("not again")]

    def checkpointed(self):
        """Wait until a checkpoint is committed and at least one more step is logged."""
        self.until((self.run_dir / "LATEST").exists)
        saved = int((self.run_dir / "LATEST").read_text().split("-")[1])
        self.until(lambda: self.step() > saved)

    def steps(self):
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line)["step"] for line in lines]

    def logs(self, *options):
        return self.launcher("logs", self.run_dir, *options)

    def attempt(self, number, name):
        (path,) = (self.run_dir / "submissions").glob(f"*/attempt-{number}/{name}.json")
        return json.loads(path.read_text())

    def started_again(self, job, excluded=None):
        """Wait until the job is back in the queue, and start it at once, because Slurm would wait about two minutes.
        Returns the step that the job had saved."""

        def shown():
            return self.slurm.client("scontrol", "show", "job", job).stdout

        self.until(lambda: "JobState=PENDING" in shown() and "Restarts=1" in shown())
        assert f"ExcNodeList={excluded or '(null)'}" in shown()
        time.sleep(2)  # sooner, Slurm takes the job's credential for a revoked one
        self.slurm.client("scontrol", "update", f"JobId={job}", "StartTime=now")
        return int((self.run_dir / "LATEST").read_text().split("-")[1])

    def finished(self):
        self.until(lambda: self.status()["state"] == "COMPLETED")

    def processes(self):
        """The command lines of the training processes on the nodes."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = path.read_text().replace("\0", " ")
            except OSError:
                continue
            if str(self.folder) in text and "slurm.conf" not in text:
                found.append(text)
        return found


def losses(run_dir):
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name.startswith("loss/")} for row in rows]


def until(ready):
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.3)


def test_two_nodes_train_the_code_and_the_config_of_the_submission(cluster):
    original, cluster.config = cluster.config, cluster.folder / "config.yaml"
    cluster.config.write_text(original.read_text())
    cluster.submit("--sbatch", "hold", steps=12)
    # what changes while the job is queued changes nothing; the copy of the code is what runs
    cluster.config.write_text("no longer: a config\n")
    (code,) = (cluster.run_dir / "submissions").glob("*/code/mom_train/__main__.py")
    code.write_text(code.read_text().replace("def main()", "print('the copied code')\n\n\ndef main()"))
    cluster.slurm.client("scontrol", "release", cluster.status()["job"])
    cluster.finished()
    assert cluster.steps() == list(range(13))
    for rank in (0, 1):
        assert "the copied code" in cluster.logs("--rank", rank)
    assert {cluster.attempt(0, f"node-{i}")["node"] for i in (0, 1)} == {"n0", "n1"}
    status = cluster.status()
    assert status["attempts"] == 1
    assert status["metrics"]["step"] == 12
    assert status["metrics"]["loss/total"] > 0


def test_a_preempted_job_saves_returns_to_the_queue_and_carries_on(cluster):
    job = cluster.submit(steps=150)
    cluster.until(lambda: cluster.step() >= 10)
    urgent = ["sbatch", "-p", "high", "-N3", "--exclusive", "--output=/dev/null", "--wrap", "srun sleep 1"]
    cluster.slurm.client(*urgent)
    saved = cluster.started_again(job)
    assert 10 <= saved < 150
    assert cluster.attempt(0, "node-0") == {"node": "n0", "code": 0, "asked": "SIGUSR2"}
    cluster.finished()
    assert f"from step {saved} of 150" in cluster.logs("--rank", 0)
    assert cluster.steps() == list(range(151))
    # its loss curve is that of a run which nobody has disturbed
    there = cluster.folder / "undisturbed"
    given = ["--nproc-per-node", 2, cluster.config, f"run_dir={there}", "training.steps=150", "checkpoint.every=10"]
    cluster.launcher("local", *given)
    assert losses(cluster.run_dir) == losses(there)


def test_a_job_out_of_time_goes_on_in_its_next_attempt_and_cancel_leaves_no_process(cluster):
    # Slurm looks every half minute and signals up to a minute early: between 50 and 80 s after the start
    job = cluster.submit("--time", "2", "--signal-delay", "10", steps=LONG)
    saved = cluster.started_again(job)
    assert saved > 0
    assert cluster.attempt(0, "node-0")["asked"] == "SIGUSR2"
    cluster.until(lambda: cluster.step() > saved)
    assert f"from step {saved} of {LONG}" in cluster.logs("--rank", 0)
    assert cluster.processes()
    # two launches would share one run's checkpoints
    refused = cluster.launcher("local", cluster.config, f"run_dir={cluster.run_dir}", code=2)
    assert f"job {job} is RUNNING" in refused
    cluster.launcher("cancel", cluster.run_dir)
    assert cluster.status()["state"] == "CANCELLED"
    until(lambda: not cluster.processes())


def test_a_node_without_power_is_replaced(cluster):
    if cluster.slurm.hosts is None:
        pytest.skip("needs one network namespace per node")
    job = cluster.submit(steps=80)
    cluster.checkpointed()
    cluster.slurm.hosts.kill(1)
    try:
        saved = cluster.started_again(job)
        cluster.finished()
    finally:
        cluster.slurm.start_node(1)
    assert cluster.status()["nodes"] == "n[0,2]"
    assert f"from step {saved} of 80" in cluster.logs("--rank", 0)
    assert cluster.steps() == list(range(81))


def test_a_node_whose_ranks_vanish_is_excluded_from_the_next_attempt(cluster):
    if cluster.slurm.hosts is None:
        pytest.skip("needs one network namespace per node")
    # so long the ranks of the other node wait for these to come back
    job = cluster.submit("--rdzv-timeout", 45, steps=80)
    cluster.checkpointed()
    for pid in cluster.slurm.hosts.pids(1):
        if any(word in Path(f"/proc/{pid}/cmdline").read_text() for word in ("submitit", "mom_train")):
            os.kill(pid, 9)  # slurmd lives: Slurm sees nothing wrong with the node
    saved = cluster.started_again(job, excluded="n1")
    assert cluster.attempt(0, "decision")["lost"] == ["n1"]
    cluster.finished()
    assert cluster.status()["nodes"] == "n[0,2]"
    assert cluster.steps() == list(range(81))
    assert f"from step {saved} of 80" in cluster.logs("--rank", 0)


def test_a_sweep_is_an_array(cluster):
    for name, rate in (("low", 0.001), ("high", 0.02)):
        (cluster.folder / f"{name}.yaml").write_text(f"base: {cluster.config}\nrun_dir: {cluster.folder / name}\n")
        with open(cluster.folder / f"{name}.yaml", "a") as file:
            file.write(f"optimizer: {{learning_rate: {rate}}}\n")
    given = ["--nodes", 1, "--gpus-per-node", 0, "--cpus-per-task", 1]
    out = cluster.launcher("submit", *given, "--sweep", cluster.folder / "*.yaml", "training.steps=5")
    jobs = dict(reversed(line.removeprefix("job ").split(" trains ")) for line in out.splitlines())
    assert [job.split("_")[1] for job in jobs.values()] == ["0", "1"]
    for name, rate in (("high", 0.02), ("low", 0.001)):
        cluster.run_dir = cluster.folder / name
        cluster.finished()
        assert cluster.status()["job"] == jobs[str(cluster.run_dir)]
        assert f"learning_rate: {rate}" in (cluster.run_dir / "config.yaml").read_text()
        assert cluster.steps() == list(range(6))


def test_a_repeating_failure_is_not_tried_for_ever(cluster):
    # a batch of four is not for three ranks: the launcher says so before anything is queued
    three = ["submit", "--nodes", 3, "--gpus-per-node", 0, cluster.config, f"run_dir={cluster.run_dir}"]
    assert "must be a multiple" in cluster.launcher(*three, code=2)
    assert not cluster.run_dir.exists()
    # shards that vanish after the submission: ranks end with code 2, the job with them, at once
    data = cluster.folder / "shards"
    os.symlink(cluster.config.parent / "train", data)
    given = ["--nodes", 1, "--gpus-per-node", 0, "--cpus-per-task", 1, "--sbatch", "hold"]
    overrides = [f"run_dir={cluster.run_dir}", f"data.train=[{{path: {data}}}]"]
    job = cluster.launcher("submit", *given, cluster.config, *overrides).split()[1]
    data.unlink()
    cluster.slurm.client("scontrol", "release", job)
    until(lambda: cluster.status()["state"] == "FAILED")
    assert cluster.attempt(0, "decision")["verdict"] == "not again: the error would repeat"
    assert cluster.logs().count("mom_train: error") == 1, "the ranks were started once"
