"""The faults of a campaign. Each is really injected into a run from outside."""

import os
import random
import re
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from tests.faults.experiment import require

SIGNALS = ("sigterm", "sigint", "sigusr1", "sigusr2")
# at work or starting: kind -> weight in the deck
ENDING = {
    "kill-rank": 16,
    "kill-agent": 6,
    "kill-launcher": 6,
    "hang": 2,
    **{f"{s}-launcher": 4 for s in SIGNALS},
    **{f"{s}-rank": 3 for s in SIGNALS},
}
PASSING = {"pause": 10}
DISK = {"full-disk": 10, "read-only-disk": 8}
DOWN = {"flipped-byte": 12, "truncated-file": 5, "latest-removed": 4, "latest-garbage": 3}
STORE = {"store-stalls": 8, "store-503": 8}
HOSTS = {"cable-out": 4, "host-cut-off": 3, "host-dies": 4}
EVERY = ENDING | PASSING | DISK | DOWN | STORE | HOSTS


@dataclass
class Moment:
    """The moment of a fault: `seconds` after the start, or that long after the run has logged `steps` more steps. With
    `saving`, it waits then until a checkpoint is being written."""

    seconds: float = 0.0
    steps: int | None = None
    saving: bool = False

    @classmethod
    def draw(cls, rng: random.Random, start_seconds: float) -> "Moment":
        kind = rng.random()
        if kind < 0.25:
            return cls(rng.uniform(0, 1.2 * start_seconds))
        return cls(rng.uniform(0, 0.1), rng.randint(1, 9), saving=kind > 0.7)

    def __str__(self):
        if self.steps is None:
            return f"{self.seconds:.1f} s after the start"
        return f"{self.steps} steps on" + (", while saving" if self.saving else "")

    def reached(self, run, timeout):
        """Wait for the moment. Returns False where the command has ended before it."""
        deadline = time.monotonic() + timeout
        target = None
        while not run.ended:
            require(time.monotonic() < deadline, f"no step was logged for {timeout:.0f} s, waiting for {self}")
            step = run.new_step()
            if self.steps is None:
                if time.monotonic() - run.began >= self.seconds:
                    return True
            elif target is None:
                if step is not None:  # ranks that come up log where they begin: what it counts from
                    target = max(step, run.from_step) + self.steps
            elif (step or 0) >= target and (not self.saving or run.saved.unfinished()):
                time.sleep(self.seconds)
                return not run.ended
            time.sleep(0.005 if self.saving else 0.02)
        return False


def send(pid, number):
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def signal_to(run, rng, kind):
    """Send the signal of a kind such as sigterm-rank or kill-launcher. Returns the name of the process that got it."""
    what, _, who = kind.partition("-")
    number = {"kill": signal.SIGKILL}.get(what) or signal.Signals[what.upper()]
    if run.ended:
        return ""
    if who == "launcher":
        pid, name = run.launchers[0].pid, "launcher"
    else:
        there = run.rank_pids() if who == "rank" else dict(enumerate(run.agents()))
        while not there and not run.ended:  # so early that none is there
            time.sleep(0.05)
            there = run.rank_pids() if who == "rank" else dict(enumerate(run.agents()))
        if not there:
            return ""
        number_of = rng.choice(sorted(there))
        pid, name = there[number_of], f"{who} {number_of}"
    send(pid, number)
    return name


def stop_a_rank(run, rng):
    """Stop a rank by SIGSTOP. Returns (rank, pid), or None where no rank is there."""
    there = run.rank_pids()
    if not there:
        return None
    rank = rng.choice(sorted(there))
    send(there[rank], signal.SIGSTOP)
    return rank, there[rank]


def failed_saves(run):
    """The steps at which a save failed. Every rank logs such a failure."""
    return set(re.findall(r"CHECKPOINT FAILED at step (\d+)", run.log()))


def until_failed_saves(run, disk_back, timeout=240):
    """Wait until a save has failed, and mend the disk. Returns how many saves failed."""
    before, deadline = failed_saves(run), time.monotonic() + timeout
    try:
        while not run.ended and failed_saves(run) == before and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        disk_back()
    return len(failed_saves(run) - before)


def full_disk(run, disk):
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 14))
    return until_failed_saves(run, filler.unlink)


def read_only_disk(run, disk):
    def mount(state):
        for _ in range(400):  # busy while a file is open for writing
            if subprocess.run(["mount", "-o", f"remount,{state}", disk], capture_output=True).returncode == 0:
                return
            time.sleep(0.02)
        raise OSError(f"{disk} cannot be mounted {state}")

    mount("ro")
    return until_failed_saves(run, lambda: mount("rw"))


def damage(saved, step, rng, kind):
    """Change a file of a checkpoint. Returns the name of the file."""
    folder = f"{saved.root}/checkpoints/step-{step}"
    names = sorted(p.rsplit("/", 1)[-1] for p in saved.fs.ls(folder, detail=False))
    path = f"{folder}/{rng.choice(names)}"
    content = bytearray(saved.fs.cat_file(path))
    at = rng.randrange(len(content))
    if kind == "truncated-file":
        del content[at:]
    else:
        content[at] ^= 1 << rng.randrange(8)
    saved.fs.pipe_file(path, bytes(content))
    return path.rsplit("/", 1)[-1]


class Disk:
    """A small file system in memory for checkpoints. It is a context manager."""

    def __init__(self, folder, megabytes=16):
        self.folder = folder
        folder.mkdir(parents=True)
        size = f"size={megabytes}m"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"cannot mount a small tmpfs: {done.stderr.strip()}")

    def __enter__(self):
        return self.folder

    def __exit__(self, *_):
        subprocess.run(["umount", "-l", self.folder], check=True)


class Store:
    """moto's S3 server, which can be told to hang or to answer 503. It is a context manager."""

    def __init__(self):
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def log(self, *_):
                pass

        self.well, self.failing, self.refused = threading.Event(), False, 0
        self.well.set()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
        }
        region = {"endpoint_url": self.url, "region_name": "us-east-1"}
        self.options = {"key": "testing", "secret": "testing", "client_kwargs": region, "skip_instance_cache": True}

    def _answer(self, environ, start_response):
        if not self.well.is_set():
            self.refused += 1
        self.well.wait()
        if self.failing:
            self.refused += 1
            start_response("503 Service Unavailable", [("Content-Type", "text/plain"), ("Content-Length", "0")])
            return [b""]
        return self._moto(environ, start_response)

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        import boto3

        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", **keys).create_bucket(Bucket="runs")
        return self

    def __exit__(self, *_):
        self.failing = False
        self.well.set()
        self._server.shutdown()

    def fail(self, kind, seconds):
        """Let the store fail for `seconds`. Returns how many requests met the failure."""
        before = self.refused
        if kind == "store-503":
            self.failing = True
        else:
            self.well.clear()
        time.sleep(seconds)
        self.failing = False
        self.well.set()
        return self.refused - before
