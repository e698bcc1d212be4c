"""Observes one training run from outside (its command, its processes, its files), and checks what must hold of it.

Nothing here asks the trainer: processes come from /proc, files are read byte by byte, and tensors are read by torch's
own converter.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
import zlib
from contextlib import suppress
from pathlib import Path

import fsspec

from tests.helpers import CHECKOUT

_MARK = "MOM_CAMPAIGN"
_COMPARED = ("loss/", "grad_norm/", "tokens/", "flops/", "anomaly/", "learning_rate")


class Violation(Exception):
    """Raised where something that must hold does not."""


def require(holds, what):
    if not holds:
        raise Violation(what)


class Saved:
    """The checkpoints in a folder or under a URL, read without the trainer's own reader."""

    def __init__(self, root, options=None):
        self.fs, self.root = fsspec.core.url_to_fs(str(root), use_listings_cache=False, **(options or {}))

    def read(self, name):
        """The bytes of a file, or None where it is not there."""
        try:
            return self.fs.cat_file(f"{self.root}/{name}")
        except FileNotFoundError:
            return None

    def folders(self):
        """The names of the files of each checkpoint: {step: names}."""
        found = {}
        with suppress(FileNotFoundError):
            for path in self.fs.ls(f"{self.root}/checkpoints", detail=False):
                step = re.search(r"step-(\d+)$", path.rstrip("/"))
                if step:
                    with suppress(FileNotFoundError):
                        found[int(step[1])] = sorted(p.rsplit("/", 1)[-1] for p in self.fs.ls(path, detail=False))
        return found

    def committed(self):
        return sorted(step for step, names in self.folders().items() if ".metadata" in names)

    def unfinished(self):
        return [s for s, names in self.folders().items() if not {".metadata", ".metadata.damaged"} & set(names)]

    def latest(self):
        """The step that the file LATEST names, or None without that file."""
        content = self.read("LATEST")
        return None if content is None else int(content.decode().strip().removeprefix("step-"))

    def damage(self, step):
        """The files of a checkpoint whose bytes differ from what its checksums say."""
        folder = f"checkpoints/step-{step}"
        sums = json.loads(self.read(f"{folder}/checksums.json"))
        found = []
        for name, want in sums.items():
            content = self.read(f"{folder}/{name}")
            if content is None or len(content) != want["size"] or zlib.crc32(content) != want["crc32"]:
                found.append(name)
        return found

    def state(self, step):
        return json.loads(self.read(f"checkpoints/step-{step}/train_state.json"))

    def tensors(self, step, scratch):
        """The tensors of weights and optimiser in a checkpoint: {name: tensor}."""
        import torch
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        copy, whole = Path(scratch) / "checkpoint", Path(scratch) / "whole.pt"
        shutil.rmtree(copy, ignore_errors=True)
        self.fs.get(f"{self.root}/checkpoints/step-{step}/", f"{copy}/", recursive=True)
        dcp_to_torch_save(copy, whole)
        return dict(_flat(torch.load(whole, weights_only=True)))


def _flat(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class Process:
    """A process of a run, identified by its number and the time of its birth."""

    def __init__(self, pid):
        self.pid = pid
        self.command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        self.dead, self.parent = fields[0] == "Z", int(fields[1])
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        self.environment = dict(v.decode().partition("=")[::2] for v in variables if v)


class Run:
    """One run and its present start. `hosts` is as in tests/helpers/hosts.py, or None for this machine alone."""

    def __init__(self, folder, config, saved, ranks=2, hosts=None, environment=None, overrides=()):
        self.folder, self.config, self.saved, self.ranks, self.hosts = folder, config, saved, ranks, hosts
        self.overrides = [f"run_dir={folder}/run", *overrides]
        self.run_dir = folder / "run"
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self.starts, self.mark, self.launchers, self.last_restarts, self.from_step = 0, "", {}, 0, 0
        folder.mkdir(parents=True, exist_ok=True)

    # ---- its command --------------------------------------------------------------------------------------

    def start(self, restarts=0):
        self.starts += 1
        self.mark, self.last_restarts = uuid.uuid4().hex, restarts
        self.log_path = self.folder / f"start-{self.starts:03d}.log"
        self.began, self.launchers = time.monotonic(), {}
        self.expect_new()
        self.began_at = time.time()
        self.recovered = None  # seconds from the start to the first new step, once `new_step` has seen it
        for host in range(len(self.hosts.names)) if self.hosts else (0,):
            self.launch(host)

    def launch(self, host):
        command = [sys.executable, "-m", "torchrun_launch", "local", "--max-restarts", str(self.last_restarts)]
        if self.hosts is None:
            command += ["--nproc-per-node", str(self.ranks)]
        else:
            command += ["--nnodes", str(len(self.hosts.names)), "--nproc-per-node", "1", "--node-rank", str(host)]
            command += ["--rdzv-endpoint", "n0:29444", "--rdzv-timeout", "90"]
        command += [str(self.config), *self.overrides]
        options = {"cwd": CHECKOUT, "env": {**self.environment, _MARK: self.mark}}
        with open(self.log_path, "ab") as log:
            options |= {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
            if self.hosts is None:
                self.launchers[host] = subprocess.Popen(command, start_new_session=True, **options)
            else:
                self.launchers[host] = self.hosts.popen(host, command, **options)

    @property
    def ended(self):
        return all(p.poll() is not None for p in self.launchers.values())

    def wait(self, timeout):
        """Wait until the launchers end. Returns the exit code of the one that began last, or the first that is not
        0."""
        deadline = time.monotonic() + timeout
        while not self.ended:
            require(time.monotonic() < deadline, f"the command has not ended after {timeout:.0f} s")
            time.sleep(0.05)
        return next((p.returncode for p in self.launchers.values() if p.returncode), 0)

    # ---- its processes ------------------------------------------------------------------------------------

    def processes(self, mark=None):
        wanted, found = f"{_MARK}={mark or self.mark}".encode(), []
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with suppress(OSError):
                    if wanted in Path(entry.path, "environ").read_bytes():
                        process = Process(int(entry.name))
                        if not process.dead:
                            found.append(process)
        return found

    def agents(self):
        return [p.pid for p in self.processes() if "-m torchrun_launch.agent" in p.command]

    def rank_pids(self):
        """The process of each rank: {rank: pid}. Loader processes are its children and have the same command line."""
        found = {}
        everyone = self.processes()
        ranks = {p.pid: p for p in everyone if "-m mom_train" in p.command and "torchrun_launch" not in p.command}
        for p in ranks.values():
            if p.parent not in ranks and "RANK" in p.environment:
                found[int(p.environment["RANK"])] = p.pid
        return found

    def all_gone(self, timeout, mark=None):
        """Wait until no process of the run is left. Returns the seconds that this took, or None where something still
        runs after `timeout` and is then killed."""
        began = time.monotonic()
        while left := self.processes(mark):
            if time.monotonic() - began > timeout:
                for process in left:
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
                return None
            time.sleep(0.1)
        return time.monotonic() - began

    # ---- what it has written ------------------------------------------------------------------------------

    def log(self):
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def rows(self):
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(x) for x in path.read_text().split("\n")[:-1] if x] if path.exists() else []

    def step(self):
        """The last step that is logged, or 0 without any."""
        try:
            with open(self.run_dir / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return 0
        return json.loads(lines[-1])["step"] if len(lines) > 1 or (lines and lines[0].startswith(b"{")) else 0

    def _file(self):
        """The inode number and the size of metrics.jsonl, or None without that file."""
        path = self.run_dir / "metrics.jsonl"
        if not path.exists():
            return None
        found = path.stat()
        return found.st_ino, found.st_size

    def expect_new(self):
        """From now on, `new_step` considers only ranks that have yet to come up."""
        self._seen, self._ups_seen = self._file(), len(self.resumed())

    def new_step(self):
        """The last step that ranks have logged which came up since the start; None before they have. Ranks that come up
        write metrics.jsonl anew, or append to it where it ends at the step from which they carry on."""
        now = self._file()
        if now is None:
            return None
        same_file = self._seen is not None and now[0] == self._seen[0]
        if same_file and (now[1] == self._seen[1] or len(self.resumed()) <= self._ups_seen):
            return None
        step = self.step()
        if self.recovered is None and step > self.from_step:
            self.recovered = time.monotonic() - self.began
        return step

    def status(self):
        path = self.run_dir / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def resumed(self):
        """The steps from which the ranks of this start carried on, one for each time that they came up."""
        return [int(x) for x in re.findall(r"ranks on \w+, from step (\d+) of", self.log())]


# ---- what must hold ---------------------------------------------------------------------------------------


def check_rows(rows, reference, last=None):
    """Check that each step up to `last` is logged once, and that what was trained equals the reference to the last bit.
    Validation may be missing where the run was asked to end meanwhile."""
    steps = [row["step"] for row in rows]
    require(steps == list(range(len(steps))), f"metrics.jsonl: steps {_around(steps)}, each should be there once")
    require(last in (None, len(rows) - 1), f"metrics.jsonl ends at step {len(rows) - 1}, the run at {last}")
    for row, want in zip(rows, reference, strict=False):
        for key in row.keys() | want.keys():
            if key.startswith(_COMPARED) or (key.startswith("val/") and key in row and key in want):
                a, b = row.get(key), want.get(key)
                require(a == b, f"step {row['step']}: {key} is {a!r}, in the undisturbed run {b!r}")


def _around(steps):
    wrong = next((i for i, step in enumerate(steps) if i != step), len(steps))
    return f"... {steps[max(0, wrong - 3) : wrong + 3]} ..."


def check_saved(saved, reference, steps, scratch):
    """Check that every committed checkpoint is whole, and that tensors and position of the newest one are those of the
    reference."""
    for step in steps:
        require(not (bad := saved.damage(step)), f"checkpoint of step {step}: {bad} not as written")
    if steps:
        newest = steps[-1]
        ours, theirs = saved.state(newest), reference.state(newest)
        for key in ("step", "sequence", "tokens", "flops", "judge", "data_fingerprint"):
            require(ours[key] == theirs[key], f"train_state of step {newest}: {key} {ours[key]} != {theirs[key]}")
        equal_tensors(
            saved.tensors(newest, scratch), reference.tensors(newest, scratch), f"checkpoint of step {newest}"
        )


def equal_tensors(ours, theirs, where):
    import torch

    require(ours.keys() == theirs.keys(), f"{where}: other tensors than the reference has")
    for name in ours:
        require(torch.equal(ours[name], theirs[name]), f"{where}: {name} is not the undisturbed run's")
