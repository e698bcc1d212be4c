"""What a Slurm job does on each of its nodes: it runs torchrun, and then decides whether the job must run again."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mom_tokenizers.errors import EXIT_PREEMPTED, NOT_RESTARTED, UserError
from mom_train.distributed.status import read_status
from torchrun_launch.ranks import Agent, exit_code, rank_environment, rendezvous
from torchrun_launch.record import job_state, replace_json, slurm

_REPORT_SECONDS = 20.0  # how long a node waits for the reports of the others after its own ranks have failed


@dataclass(frozen=True)
class NodeTask:
    """One node's part of a training job. submitit calls it on each node of every attempt.

    The job is put back into the queue in two cases: when its ranks were preempted (a signal, the time limit,
    training.time_limit) and have saved a checkpoint, and when they failed in a way that another attempt may not. After
    a failure, nodes that did not report are excluded. The job is not put back when it was cancelled, when the error
    would repeat, when `max_requeues` is used up, or when two attempts in a row failed with no checkpoint between them.
    """

    submission: str
    """The folder that holds config.yaml and the results of each attempt."""
    code: str
    """The folder with a copy of the packages, made at submission. It is this process's working directory."""
    run_dir: str
    ranks: int
    max_restarts: int
    max_requeues: int
    rendezvous_timeout: int
    shutdown_timeout: float

    def __call__(self) -> None:
        if not Path(__file__).resolve().is_relative_to(Path(self.code).resolve()):
            raise UserError(f"{__file__} would train in place of the code in {self.code}: is PYTHONSAFEPATH set?")
        sys.exit(self.run())

    @property
    def attempt(self) -> int:
        return int(os.environ.get("SLURM_RESTART_COUNT", 0))

    @property
    def job(self) -> str:
        return os.environ["SLURM_JOB_ID"]

    def run(self) -> int:
        """Run this node's ranks, report how they ended, and on one node decide what follows. Returns the exit code."""
        run_dir = Path(self.run_dir)
        node, nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_JOB_NUM_NODES"])
        folder = self.folder(self.attempt)
        names = slurm("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        print(f"torchrun_launch: attempt {self.attempt} of job {self.job}, node {node} of {names}", flush=True)
        port = 20000 + int(self.job) % 10000
        meeting = rendezvous(
            str(nodes), f"{names[0]}:{port}", f"{self.job}-{self.attempt}", self.rendezvous_timeout, node == 0
        )
        torchrun = [*meeting, f"--nproc-per-node={self.ranks}", f"--max-restarts={self.max_restarts}", "--tee=3"]
        torchrun += [f"--log-dir={folder / names[node]}"]
        cores = len(os.sched_getaffinity(0))
        environment = {**os.environ, **rank_environment(self.ranks, cores, os.environ)}
        before = read_status(run_dir)
        command = ["-m", "mom_train", str(Path(self.submission) / "config.yaml")]
        agent = Agent(torchrun, command, environment, cwd=Path(self.code))
        code = agent.wait(self.shutdown_timeout)

        # From here on only SIGKILL from Slurm can end this process, so that it can complete its report and decision.
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        status = read_status(run_dir)
        status = status if status != before else None
        report = {"node": names[node], "code": code, "asked": agent.asked and agent.asked.name}
        replace_json(folder / f"node-{node}.json", report)
        reported = self.reports(folder, nodes, everyone=code != 0)
        if node != min(reported):
            return 0 if code == 0 else exit_code(code, status)
        # The node that decides may have seen only closed connections where the error was on another node.
        code = next((other for other in reported.values() if other in NOT_RESTARTED), code)
        lost = [names[n] for n in range(nodes) if n not in reported] if code else []
        return self.decide(code, agent.asked, status, lost)

    def folder(self, attempt: int) -> Path:
        return Path(self.submission) / f"attempt-{attempt}"

    def reports(self, folder: Path, nodes: int, everyone: bool) -> dict[int, int]:
        """torchrun's exit code on each node that has reported. With `everyone`, wait a while for the reports of all
        nodes, because one may be lost; otherwise wait only for node 0."""
        deadline = time.monotonic() + _REPORT_SECONDS
        while True:
            paths = {int(path.stem.removeprefix("node-")): path for path in folder.glob("node-*.json")}
            found = {number: json.loads(path.read_text())["code"] for number, path in paths.items()}
            if len(found) == nodes or time.monotonic() > deadline or (not everyone and 0 in found):
                return found
            time.sleep(0.5)

    def decide(self, code: int, asked: signal.Signals | None, status: dict[str, Any] | None, lost: list[str]) -> int:
        """Decide whether the job runs again, and requeue it then. Returns the job's exit code. Only one of the nodes
        that are left calls this."""
        ending = exit_code(code, status)
        step = status["step"] if status else None  # where the ranks crashed, the step at which they had started
        over = status is not None and status["state"] in ("finished", "stopped")
        preempted = ending == EXIT_PREEMPTED or (asked is not None and not over)
        decision: dict[str, Any] = {"step": step, "code": code, "lost": lost, "failed": bool(ending) and not preempted}
        if ending == 0 and not preempted:
            verdict = "done"
        elif code in NOT_RESTARTED:
            verdict = "not again: the error would repeat"
        elif self.attempt >= self.max_requeues:
            verdict = f"not again: --max-requeues {self.max_requeues} is used up"
        elif decision["failed"] and not lost and self.failed_before(step):
            verdict = f"not again: two attempts in a row failed after starting at step {step}"
        elif (state := job_state(self.job)["state"]) != "RUNNING":  # cancelled, or Slurm is requeueing it itself
            verdict = f"left to Slurm: the job is {state}"
        else:
            verdict = "again"
        replace_json(self.folder(self.attempt) / "decision.json", decision | {"verdict": verdict, "time": time.time()})
        print(f"torchrun_launch: {verdict}" + (f", without {', '.join(lost)}" if lost else ""), flush=True)
        if verdict == "again":
            self.requeue(lost)
            return EXIT_PREEMPTED
        return ending

    def failed_before(self, step: int | None) -> bool:
        """Whether the attempt before this one failed at the same step."""
        try:
            last = json.loads((self.folder(self.attempt - 1) / "decision.json").read_text())
        except FileNotFoundError:
            return False
        return last["failed"] and last["step"] == step

    def requeue(self, lost: list[str]) -> None:
        """Put this job back into the queue, without the nodes that were lost in this attempt or an earlier one."""
        excluded = set(lost)
        for folder in Path(self.submission).glob("attempt-*/decision.json"):
            excluded.update(json.loads(folder.read_text())["lost"])
        slurm("scontrol", "requeue", self.job)
        if excluded:  # the nodes of a job can be changed only while it is pending; this process now has seconds left
            slurm("scontrol", "update", f"JobId={self.job}", f"ExcNodeList={','.join(sorted(excluded))}")
        time.sleep(120)  # wait until Slurm ends this process, since its own exit could be taken for the end of the job
