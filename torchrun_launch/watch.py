"""Watches a run from outside, a Slurm job or a local launch: shows its state and its log, and cancels it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mom_tokenizers.errors import UserError
from mom_train.distributed.status import read_status
from mom_train.observe.goodput import described, goodput
from torchrun_launch.record import ACTIVE, job_state, process_lives, read_record, slurm

_TAG = re.compile(r"\[rank (\d+)\]: ")
_TAGS = re.compile(r"(?=\[rank \d+\]: )")
_TAIL_BYTES = 1 << 20


def status(run_dir: Path) -> dict[str, Any]:
    """The state of a run, as a dict.

    It has kind, job or pid, state, logs (files), and again (the command that continues the run). Where known, it also
    has status (what rank 0 last wrote), metrics (losses and tokens/s of the last logged step), seconds_left, and
    goodput (where the wall time went, as `mom_train.observe.goodput.Account.result` returns it). The
    state of a job is Slurm's name for it; that of a local launch is RUNNING, ENDED, or UNKNOWN on another host. Raises
    UserError where nothing was launched in `run_dir`.
    """
    record = read_record(run_dir)
    found: dict[str, Any] = {"run_dir": str(run_dir), "kind": record["kind"], "launched": record["time"]}
    if record["kind"] == "slurm":
        found |= {"job": record["job"], **job_state(record["job"])}
        attempts = sorted(Path(record["submission"]).glob("attempt-*"), key=lambda p: int(p.name.split("-")[1]))
        found["attempts"] = len(attempts)
    else:
        lives = process_lives(record)
        state = "UNKNOWN" if lives is None else "RUNNING" if lives else "ENDED"
        found |= {"host": record["host"], "pid": record["pid"], "state": state}
    found["logs"] = [str(path) for path in _logs(record)]
    if record.get("command"):
        again = ["python", "-m", "torchrun_launch", *record["command"]]
        found["again"] = f"cd {shlex.quote(record.get('folder', '.'))} && {shlex.join(again)}"
    found["status"] = said = read_status(run_dir)
    if (account := goodput(run_dir)) is not None:
        found["goodput"] = account
    lines = _last_lines(run_dir / "metrics.jsonl")
    if lines:
        last = found["metrics"] = lines[-1]
        steps = said["steps"] if said else None
        if steps is not None:
            found["seconds_left"] = _seconds_left(lines, last["step"], steps)
    return found


def describe(found: dict[str, Any]) -> str:
    """The state of a run as a few lines of text for people."""
    if found["kind"] == "slurm":
        who = f"job {found['job']} {found['state']}"
        reason = found["reason"] if found["reason"] != "None" else ""
        details = {"": reason, "nodes": found["nodes"], "ran": found["elapsed"], "of its limit left": found["left"]}
        who += "".join(f", {name} {value}".replace(",  ", ", ") for name, value in details.items() if value)
        who += f", attempt {found['attempts']}" if found["attempts"] else ""
    else:
        who = f"process {found['pid']} on {found['host']} {found['state']}"
    lines = [f"{found['run_dir']}: {who}"]
    if (said := found["status"]) is not None:
        reason = f": {said['reason']}" if said.get("reason") else ""
        lines.append(f"  {said['state']} at step {said['step']:,} of {said['steps']:,}{reason}")
    over = found["state"] not in ACTIVE
    if over and (said is None or said["state"] == "running"):
        away = f", unless they still run on {found['host']}" if found["state"] == "UNKNOWN" and "host" in found else ""
        lines.append(f"  its ranks ended without a word: they were killed, or their machine failed{away}")
    if over and (said is None or said["state"] not in ("finished", "stopped")):
        lines += [f"  what it printed: {path}" for path in found["logs"]]
        lines += [f"  to go on from its last checkpoint: {found['again']}"] if "again" in found else []
    if metrics := found.get("metrics"):
        losses = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in metrics.items() if k.startswith("loss/"))
        speed = f"{metrics['perf/tokens_per_s']:,.0f} tokens/s" if "perf/tokens_per_s" in metrics else ""
        lines.append(f"  step {metrics['step']:,}: " + ", ".join(part for part in (losses, speed) if part))
    if "goodput" in found:
        lines.append(f"  {described(found['goodput'])}")
    if found.get("seconds_left"):
        minutes = int(found["seconds_left"] // 60)
        lines.append(f"  about {minutes // 60} h {minutes % 60:02d} min of training left")
    return "\n".join(lines)


def _seconds_left(lines: list[dict[str, float]], step: float, steps: int) -> float | None:
    """The seconds of training that are left at the last logged speed, if the remaining steps have as many tokens as the
    steps so far had on average."""
    speed = lines[-1].get("perf/tokens_per_s")
    tokens = sum(value for key, value in lines[-1].items() if key.startswith("tokens/"))
    return (steps - step) * tokens / step / speed if speed and step else None


def _last_lines(path: Path) -> list[dict[str, float]]:
    """The last complete lines of metrics.jsonl that hold the losses of a step. Only the end of a long file is read."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode()
    except FileNotFoundError:
        return []
    whole = text.split("\n")[1 if size > _TAIL_BYTES else 0 : -1]
    return [line for line in map(json.loads, filter(None, whole)) if "loss/total" in line]


def log_files(run_dir: Path) -> list[Path]:
    """The files with the output of the run's last launch, one per node. Raises UserError where the output went to a
    terminal."""
    record = read_record(run_dir)
    if record["kind"] == "local" and record["logs"] is None:
        raise UserError(f"{run_dir}: its output went to the terminal that it was started from")
    return _logs(record)


def _logs(record: dict[str, Any]) -> list[Path]:
    if record["kind"] == "slurm":
        # the batch script's own output is task 0's file
        return sorted(Path(record["output"]).glob(f"{record['job']}_*_log.out"))
    return [path for path in [Path(record["logs"])] if path.exists()] if record["logs"] else []


def logs(run_dir: Path, rank: int | None, follow: bool) -> Iterator[str]:
    """The lines of the log. Where `rank` is given, these are only the lines of that rank, without its tag. With
    `follow`, new lines are yielded until the run has ended."""
    offsets: dict[Path, int] = {}
    while True:
        active = follow and _active(run_dir)
        for path in log_files(run_dir):
            with open(path, "rb") as file:
                file.seek(offsets.get(path, 0))
                block = file.read()
            if active:  # a line that is still being written is left for the next turn
                block = block[: block.rfind(b"\n") + 1]
            offsets[path] = offsets.get(path, 0) + len(block)
            for line in block.decode(errors="replace").splitlines():
                for part in _TAGS.split(line):  # a progress bar does not end its line, so other output follows in it
                    tag = _TAG.match(part)
                    if rank is None and part[tag.end() if tag else 0 :]:
                        yield part
                    elif tag is not None and int(tag[1]) == rank and part[tag.end() :]:
                        yield part[tag.end() :]
        if not active:
            return
        time.sleep(1.0)


def _active(run_dir: Path) -> bool:
    record = read_record(run_dir)
    if record["kind"] == "slurm":
        return job_state(record["job"])["state"] in ACTIVE
    return bool(process_lives(record))


def cancel(run_dir: Path, timeout: float = 300) -> str:
    """End the run's job or process, and wait until it has ended. A local run saves a checkpoint first; a job has only
    the time that Slurm's KillWait gives it. Returns a sentence that says what was done. Raises UserError where the run
    does not end within `timeout` seconds."""
    record = read_record(run_dir)
    if record["kind"] == "local" and process_lives(record) is None:
        raise UserError(f"{run_dir}: it was started on {record['host']}; cancel it there")
    if not _active(run_dir):
        return f"{run_dir}: nothing runs"
    if record["kind"] == "slurm":
        slurm("scancel", record["job"])
        what = f"job {record['job']}"
    else:
        os.kill(record["pid"], signal.SIGTERM)
        what = f"process {record['pid']}"
    deadline = time.monotonic() + timeout
    while _active(run_dir):
        if time.monotonic() > deadline:
            raise UserError(f"{run_dir}: {what} was told to end and still runs after {timeout:.0f} s")
        time.sleep(0.5)
    return f"{run_dir}: {what} has ended"
