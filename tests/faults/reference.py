"""The run that is left alone: its config, its data, and the checks that need no other run."""

import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.faults.experiment import Run, Saved, equal_tensors, require
from tests.helpers.corpus import random_document, write_dataset
from tests.helpers.run_config import write_config

INTERVAL = 10  # steps between checkpoints
TIMEOUT, FIRST_TIMEOUT = 20.0, 180.0  # seconds that a collective may take, those up to the first step included
PATIENCE = FIRST_TIMEOUT + 90  # with torchrun's half minute for a stopped rank, which no SIGTERM reaches


@dataclass
class Reference:
    config: Path
    rows: list
    saved: Saved
    bad_steps: dict  # step -> rank whose data held the NaN
    start_seconds: float
    step_seconds: float

    def state_dict(self):
        numbers = {"start_seconds": self.start_seconds, "step_seconds": self.step_seconds}
        return {"rows": self.rows, "bad_steps": list(self.bad_steps.items()), **numbers}

    @classmethod
    def of(cls, folder, state):
        """The reference that was made in `folder` before."""
        bad = {int(step): int(rank) for step, rank in state["bad_steps"]}
        saved = Saved(folder / "reference/run")
        return cls(folder / "config.yaml", state["rows"], saved, bad, state["start_seconds"], state["step_seconds"])


def make_config(folder, steps, ranks):
    """The config of a run of Transfusion on real shards, in which three documents hold a latent that is not a
    number."""
    made, bad = iter(range(10**6)), {60, 200, 330}

    def make(rng, latent_width):
        number, document = next(made), random_document(rng, latent_width)
        pictures = [s for s in document if s.modality == 1]
        if number in bad:
            while not pictures:
                document = random_document(rng, latent_width)
                pictures = [s for s in document if s.modality == 1]
            pictures[0].values[3, 2] = np.nan
        return document

    write_dataset(folder / "train", documents=480, shards=4, seed=1, latent_width=4, make=make)
    write_dataset(folder / "val", documents=30, shards=1, seed=2, latent_width=4)
    return write_config(
        folder,
        objective={"diffusion": {"patch_width": 4}},
        data__workers=1,
        training={"steps": steps, "batch": 2 * ranks, "micro_batch": 1, "ema_decay": 0.9},
        validation={"every": 12, "sequences": 2 * ranks},
        checkpoint={"every": INTERVAL, "keep": 3, "max_failures": 1000},
        parallel={"timeout": TIMEOUT, "first_step_timeout": FIRST_TIMEOUT},
    )


def make_reference(folder, config, ranks):
    """Train the reference run undisturbed, and check what can be checked of it alone: that a bad step changes no
    weight."""
    saved = Saved(folder / "reference/run")
    run = Run(folder / "reference", config, saved, ranks, overrides=["checkpoint.every=1", "checkpoint.keep=100000"])
    try:
        run.start()
        while run.step() == 0 and not run.ended:
            time.sleep(0.02)
        started = time.monotonic() - run.began
        code = run.wait(1800)
    finally:
        run.all_gone(0)
    require(code == 0, f"the undisturbed run failed with exit code {code}:\n{run.log()[-3000:]}")
    rows = run.rows()
    steps = (time.monotonic() - run.began - started) / max(1, len(rows) - 1)
    bad = bad_steps(run.log())
    require(bad, "no step met a NaN: more steps are needed")
    for step in (s for s in bad if s > 1):
        before, after = (saved.tensors(s, folder) for s in (step - 1, step))
        weights = [name for name in before if not name.startswith("ema.")]
        equal_tensors({n: after[n] for n in weights}, {n: before[n] for n in weights}, f"bad step {step}")
    return Reference(config, rows, saved, bad, started, steps)


def bad_steps(log):
    """The bad steps that the log names, with the rank whose patches were not finite: {step: rank}."""
    return {int(s): int(r) for s, r in re.findall(r"BAD STEP (\d+), .*patches not finite on rank (\d+)", log)}
