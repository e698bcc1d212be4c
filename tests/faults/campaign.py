"""Disturb a training run at seeded random moments, and check that it ends as if nothing had happened.

    python -m tests.faults.campaign --faults 200 --seed 0 [--ranks 2] [--kinds kill-rank full-disk ...] [--json OUT]

First a reference run trains undisturbed and saves a checkpoint at every step. Then runs of the same config are
disturbed by one fault after another: they are killed, signalled or stopped, they lose disk, network or object store, or
their checkpoints are damaged. The same command is started again each time, until all faults are used up. Whenever a run
is down, and at its end, the campaign checks that each step is in metrics.jsonl once and equals the reference to the
last bit, that every checkpoint is whole and the newest one has the tensors of the reference, that the run went on from
the newest checkpoint there was, that status.json tells the truth, and that no process is left running. Where any of
that does not hold, the exit code is 1, and a message says how to produce it again.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tests.faults import faults as f
from tests.faults.disturbed import Campaign, Outcome
from tests.faults.experiment import Violation
from tests.faults.reference import Reference, make_config, make_reference
from tests.helpers import hosts as hosts_module

PLACES = {"store": f.STORE, "hosts": f.HOSTS, "disk": f.ENDING | f.PASSING | f.DISK | f.DOWN}


def table(outcomes):
    lines = [
        "| fault | count | outcome | steps lost, max | mean | seconds to the next step, median |",
        "|---|--:|---|--:|--:|--:|",
    ]
    for kind in [*f.EVERY, "nan-in-data"]:
        mine = [o for o in outcomes if o.kind == kind]
        if mine:
            ends = {}
            for o in mine:
                ends[o.ended] = ends.get(o.ended, 0) + 1
            lost, took = [o.steps_lost for o in mine], sorted(o.seconds for o in mine if o.seconds is not None)
            cells = [kind, len(mine), ", ".join(f"{v} {k}" for k, v in ends.items()), max(lost), f"{np.mean(lost):.1f}"]
            lines.append(f"| {' | '.join(map(str, [*cells, f'{took[len(took) // 2]:.1f}' if took else '']))} |")
    return "\n".join(lines)


def deal(kinds, count, rng):
    """Draws `count` kinds at random by their weights, in shuffled order. Each kind comes once before any comes
    again."""
    once = list(kinds)
    rng.shuffle(once)
    rest = rng.choices(list(kinds), list(kinds.values()), k=max(0, count - len(once)))
    return (once + rest)[:count] if count < len(once) else [*once, *rest]


class Progress:
    """The file progress.json, with which a campaign that was cut short goes on. It begins anew the run that it was
    at."""

    def __init__(self, folder, command):
        self.path, self.folder = folder / "progress.json", folder
        self.state = json.loads(self.path.read_text()) if self.path.exists() else {"command": command, "places": {}}
        if self.state["command"] != command:
            raise SystemExit(f"{folder} holds another campaign: {self.state['command']}. Use another --output.")
        self.outcomes = [Outcome(**outcome) for outcome in self.state.get("outcomes", [])]
        self.began, self.minutes_before = time.monotonic(), self.state.get("minutes", 0.0)

    @property
    def minutes(self):
        return self.minutes_before + (time.monotonic() - self.began) / 60

    def reference(self, steps, ranks):
        made = self.state.get("reference")
        if made is not None:
            return Reference.of(self.folder, made)
        for name in ("train", "val", "reference"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        reference = make_reference(self.folder, make_config(self.folder, steps, ranks), ranks)
        self.state["reference"] = reference.state_dict()
        self._write()
        return reference

    def go_on(self, place, campaign):
        if place in self.state["places"]:
            campaign.load_state_dict(self.state["places"][place])

    def save(self, place, campaign):
        self.state["places"][place] = campaign.state_dict()
        self.state["outcomes"] = [asdict(outcome) for outcome in self.outcomes]
        self._write()

    def _write(self):
        self.state["minutes"] = self.minutes
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.state))
        partial.rename(self.path)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, metavar="N", help="faults to inject (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the choice of faults and of their moments (%(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks of each run (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="steps of each run (%(default)s)")
    parser.add_argument(
        "--kinds", nargs="+", choices=f.EVERY, metavar="KIND", help=f"inject only these kinds: {', '.join(f.EVERY)}"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=1e9,
        help="begin no new fault after so many minutes; the same command with the same --output goes on",
    )
    output = "folder to keep, with which the same command goes on (default: a new folder in TMPDIR)"
    parser.add_argument("--output", type=Path, metavar="DIR", help=output)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="OUT", help="write every fault to OUT or to standard output"
    )
    given = parser.parse_args(arguments)
    rng = random.Random(given.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave nothing running
    kinds = {k: w for k, w in f.EVERY.items() if given.kinds is None or k in given.kinds}
    skipped = {}
    if os.geteuid() != 0:
        skipped |= dict.fromkeys(f.DISK, "mounting a small disk needs root")
    if reason := hosts_module.why_not():
        skipped |= dict.fromkeys(f.HOSTS, reason)
    try:
        import moto.server  # noqa: F401
        import s3fs  # noqa: F401
    except ImportError as error:
        skipped |= dict.fromkeys(f.STORE, str(error))
    for kind in kinds.keys() & skipped.keys():
        print(f"NOT TESTED: {kind}: {skipped[kind]}", file=sys.stderr)
        del kinds[kind]
    cards = deal(kinds, given.faults, rng)
    folder = given.output or Path(tempfile.mkdtemp(prefix="mom-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    again = f"python -m tests.faults.campaign --faults {given.faults} --seed {given.seed} --ranks {given.ranks}"
    again += f" --steps {given.steps}" + (f" --kinds {' '.join(given.kinds)}" if given.kinds else "")
    progress = Progress(folder, again)
    outcomes, campaign = progress.outcomes, None
    try:
        reference = progress.reference(given.steps, given.ranks)
        print(
            f"undisturbed: first step after {reference.start_seconds:.1f} s, {reference.step_seconds * 1000:.0f} ms a "
            f"step, NaN in steps {list(reference.bad_steps)}, which changed no weight",
            file=sys.stderr,
            flush=True,
        )
        for place, there in PLACES.items():
            deck = [k for k in cards if k in there]
            if deck:
                own = random.Random(f"{given.seed} {place}")
                until = progress.began + 60 * given.minutes
                campaign = Campaign(place, reference, folder, given.ranks, own, deck, until, outcomes)
                progress.go_on(place, campaign)
                for _ in campaign.run_all():
                    progress.save(place, campaign)
    except Violation as violation:
        recent = [f"{o.kind} {o.moment}" for o in outcomes[-5:]]
        where = f"start {campaign.run.starts} in {campaign.run.folder}" if campaign is not None else "the reference run"
        print(f"VIOLATION in {where}: {violation}\nbefore it: {recent}\nagain: {again}", file=sys.stderr)
        print(table(outcomes))
        return 1
    print(table(outcomes))
    took = f"{len(outcomes)} faults in {progress.minutes:.0f} minutes, seed {given.seed}"
    print(f"\n{took}: every run ended as the undisturbed one")
    if given.json is not None:
        text = json.dumps({"seed": given.seed, "faults": [asdict(o) for o in outcomes]}, indent=1) + "\n"
        print(text) if given.json == "-" else Path(given.json).write_text(text)
    if given.output is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
