"""torchrun across hosts without Slurm: the launcher on each, network namespaces in between."""

import json
import sys
import time

import pytest

from tests.helpers import CHECKOUT

PORT = 29431


@pytest.fixture
def fleet(hosts, tiny, tmp_path):
    return Fleet(hosts, tiny / "config.yaml", tmp_path)


class Fleet:
    """One run on two hosts, started by the same command on each."""

    def __init__(self, hosts, config, folder):
        self.hosts, self.config, self.folder = hosts, config, folder
        self.run_dir = folder / "run"
        self.launchers = {}

    def launch(self, host, steps):
        command = [sys.executable, "-m", "torchrun_launch", "local", "--nnodes", "2", "--nproc-per-node", "1"]
        command += [
            "--node-rank",
            host,
            "--rdzv-endpoint",
            f"n0:{PORT}",
            "--rdzv-timeout",
            "300",
            "--max-restarts",
            "3",
        ]
        command += [self.config, f"run_dir={self.run_dir}", f"training.steps={steps}", "checkpoint.every=10"]
        with open(self.folder / f"n{host}.log", "a") as log:
            self.launchers[host] = self.hosts.popen(host, command, cwd=CHECKOUT, stdout=log, stderr=log)

    def log(self, host):
        return (self.folder / f"n{host}.log").read_text()

    def steps(self):
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line)["step"] for line in lines]

    def until_step(self, step, timeout=900):
        deadline = time.monotonic() + timeout
        while max(self.steps(), default=0) < step:
            assert time.monotonic() < deadline, self.log(0)[-3000:] + self.log(1)[-3000:]
            assert all(p.poll() in (None, 0) for p in self.launchers.values()), self.log(0)[-3000:]
            time.sleep(0.1)

    def finish(self, timeout=900):
        codes = {host: p.wait(timeout) for host, p in self.launchers.items()}
        assert codes == {0: 0, 1: 0}, self.log(0)[-3000:] + self.log(1)[-3000:]


def test_a_host_that_dies_and_returns_joins_again_and_the_run_goes_on(fleet):
    for host in (0, 1):
        fleet.launch(host, steps=80)
    fleet.until_step(15)
    fleet.hosts.kill(1)
    fleet.launchers.pop(1).wait(60)
    time.sleep(3)
    fleet.launch(1, steps=80)
    fleet.finish()
    assert fleet.steps() == list(range(81))
    assert fleet.log(0).count("from step") == 2, "the survivor's ranks started once again"
    saved = int(fleet.log(0).rpartition("from step ")[2].split()[0])
    assert saved >= 10
    assert saved % 10 == 0


def test_a_cable_out_for_six_seconds_costs_no_restart(fleet):
    for host in (0, 1):
        fleet.launch(host, steps=60)
    fleet.until_step(5)
    fleet.hosts.link(1, "down")
    time.sleep(1)
    reached = max(fleet.steps())
    time.sleep(5)
    assert max(fleet.steps()) <= reached + 1, "the ranks wait for each other"
    fleet.hosts.link(1, "up")
    fleet.finish()
    assert fleet.steps() == list(range(61))
    assert fleet.log(0).count("from step") == 1
