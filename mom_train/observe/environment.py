"""Records the machines and versions that a run uses in RUN/environment.json, which is rewritten at each start."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mom_tokenizers.files import write_whole
from mom_train.distributed.ranks import Ranks


def environment(ranks: Ranks) -> list[Any]:
    """Gathers what each rank runs on: (machine, name of its GPU or None). Collective: all ranks must call it."""
    everyone: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everyone, _this_machine(ranks))
    return everyone


def write_environment(run_dir: Path, everyone: Sequence[Any], ranks: Ranks, step: int) -> None:
    """Writes RUN/environment.json. Only rank 0 calls it. `everyone` is what `environment` returned.

    In the file, `hosts` has one entry for each machine: name, ranks, cpu, cores (those that the process may use),
    memory_gib, gpus. `starts` has one entry for each time that the run was started: time (UTC), step, world_size,
    hosts.
    """
    hosts: dict[str, dict[str, Any]] = {}
    for rank, (machine, gpu) in enumerate(everyone):
        host = hosts.setdefault(machine["name"], {**machine, "ranks": [], "gpus": []})
        host["ranks"].append(rank)
        host["gpus"] += [gpu] if gpu else []
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "environment.json"
    start = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "world_size": ranks.world_size,
        "hosts": list(hosts),
    }
    values = {
        "command": sys.orig_argv,
        "world_size": ranks.world_size,
        "device": ranks.device.type,
        "hosts": list(hosts.values()),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "version": importlib.metadata.version("mixture-of-mamba"),
        "git": _git(),
        "slurm": {k: v for k in ("SLURM_JOB_ID", "SLURM_JOB_PARTITION") if (v := os.environ.get(k))},
        "starts": [*_earlier(path), start],
    }
    write_whole(path, json.dumps(values, indent=1) + "\n")


def _this_machine(ranks: Ranks) -> tuple[dict[str, Any], str | None]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {"name": socket.gethostname(), "cpu": _cpu(), "cores": cores, "memory_gib": _memory_gib()}
    return machine, torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else None


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _git() -> dict[str, Any] | None:
    """The commit that this code was checked out from, and whether tracked files differ from it. None outside git."""

    def git(*words: str) -> str:
        line = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _earlier(path: Path) -> list[dict[str, Any]]:
    try:
        starts = json.loads(path.read_text())["starts"]
    except (OSError, ValueError, KeyError):
        return []
    return starts if isinstance(starts, list) else []
