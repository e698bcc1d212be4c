"""The record RUN/launch.json: what started a run last, and whether that still runs. Also asks Slurm about a job."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from mom_tokenizers.errors import UserError, read_json, user_path
from mom_tokenizers.files import write_whole

_CLIENT_SECONDS = 30  # Slurm's commands hang for long where its controller cannot be reached
ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING", "STAGE_OUT"}


def replace_json(path: Path, value: Any) -> None:
    """Replace the file `path` by `value` as JSON in one step."""
    with user_path(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(value, indent=1) + "\n")


def write_record(run_dir: Path, record: dict[str, Any]) -> None:
    """Write what starts a run into its launch.json, with the time and the working directory."""
    replace_json(run_dir / "launch.json", record | {"time": time.time(), "folder": os.getcwd()})


def read_record(run_dir: Path) -> dict[str, Any]:
    """The record in a run's launch.json. Raises UserError where nothing was launched in `run_dir`."""
    try:
        record = read_json(run_dir / "launch.json")
    except UserError:
        if (run_dir / "launch.json").exists():
            raise
        raise UserError(
            f"{run_dir}: nothing was launched here (no launch.json); name a run's directory. "
            "A run that python -m mom_train began has its state in status.json"
        ) from None
    if not isinstance(record, dict):
        raise UserError(f"{run_dir / 'launch.json'}: expected a JSON object")
    return record


def this_process() -> dict[str, Any]:
    """Values that identify this process even after its process id is used again."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}


def process_lives(record: dict[str, Any]) -> bool | None:
    """Whether the process of a local launch still runs. None where it is on another host."""
    if record["host"] != socket.gethostname():
        return None
    return _born(record["pid"]) == record["born"]


def _born(pid: int) -> int | None:
    """The time when the process began, in clock ticks since the machine started. None where there is no such
    process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else int(fields[18])


def check_free(run_dir: Path) -> None:
    """Raises UserError where another launch of the run is active, because two launches overwrite each other's
    checkpoints."""
    if not (run_dir / "launch.json").exists():
        return
    record = read_record(run_dir)
    if record["kind"] == "slurm":
        if shutil.which("squeue") is None:
            return
        if (state := job_state(record["job"])["state"]) in ACTIVE:
            raise UserError(
                f"{run_dir}: job {record['job']} is {state} on it. "
                f"End it first (python -m torchrun_launch cancel {run_dir}), or use another run_dir."
            )
    elif process_lives(record):
        raise UserError(
            f"{run_dir}: process {record['pid']} is training it. "
            f"End it first (python -m torchrun_launch cancel {run_dir}), or use another run_dir."
        )


def slurm(*command: str) -> str:
    """The output of one of Slurm's commands. Raises UserError with the command's own message where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CLIENT_SECONDS)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found. Is this a node of the cluster?") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {_CLIENT_SECONDS} s: is Slurm's controller up?") from None
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def job_state(job: str) -> dict[str, str]:
    """{"state", "reason", "elapsed", "left" (of its time limit), "nodes"} of a job, from squeue while it knows the job,
    and then from sacct. The state is UNKNOWN where neither knows it. Raises UserError where Slurm does not answer."""
    # squeue fails for a job that it has forgotten.
    try:
        line = slurm("squeue", "-h", "-j", job, "-o", "%T|%r|%M|%L|%N").strip()
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        line = ""
    if line:
        return dict(zip(("state", "reason", "elapsed", "left", "nodes"), line.splitlines()[0].split("|"), strict=True))
    try:
        line = slurm("sacct", "-n", "-X", "-P", "-j", job, "-o", "State,ExitCode,Elapsed,NodeList").strip()
    except UserError:  # a cluster without accounting
        line = ""
    if not line:
        return {
            "state": "UNKNOWN",
            "reason": "neither squeue nor sacct knows it",
            "elapsed": "",
            "left": "",
            "nodes": "",
        }
    state, code, elapsed, nodes = line.splitlines()[-1].split("|")
    return {"state": state.split()[0], "reason": f"exit {code}", "elapsed": elapsed, "left": "", "nodes": nodes}
