"""Disturbs runs at one place (a small disk, an object store, or two hosts) with one fault after another."""

import random
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import faults as f
from tests.faults.experiment import Run, Saved, check_rows, check_saved, require
from tests.faults.reference import INTERVAL, PATIENCE, TIMEOUT, Reference, bad_steps
from tests.helpers import hosts as hosts_module


@dataclass
class Outcome:
    """What one fault did to a run."""

    kind: str
    place: str
    moment: str
    detail: str = ""
    ended: str = "went on"
    steps_lost: int = 0
    seconds: float | None = None  # from the fault, or the next start, to the next new step


@dataclass
class Campaign:
    """The faults and runs of a campaign at one place: on a small disk, on an object store, or on two hosts."""

    place: str
    reference: Reference
    folder: Path
    ranks: int
    rng: random.Random
    deck: list  # kinds still to come
    until: float  # time.monotonic() after which no fault is injected any more
    outcomes: list = field(default_factory=list)
    world: object = None
    number: int = 0  # of runs

    def run_all(self):
        """Inject all faults, run by run, and finish the last run undisturbed. Yields after each run, when nothing is
        running. A later process can then go on with `state_dict` alone."""
        while self.deck and time.monotonic() <= self.until:
            self.number += 1
            self._one_run(self.number)
            yield

    def state_dict(self):
        version, numbers, gauss = self.rng.getstate()
        return {"number": self.number, "deck": self.deck, "rng": [version, list(numbers), gauss]}

    def load_state_dict(self, state):
        version, numbers, gauss = state["rng"]
        self.rng.setstate((version, tuple(numbers), gauss))
        self.number, self.deck = state["number"], state["deck"]

    def _one_run(self, number):
        with ExitStack() as stack:
            folder = self.folder / f"{self.place}-{number:02d}"
            shutil.rmtree(folder, ignore_errors=True)  # of a campaign that was cut short in it
            folder.mkdir(parents=True)
            overrides, environment, hosts, self.world = [], {}, None, None
            self.last = len(self.reference.rows) - 1
            if self.place != "disk":
                self.last = min(self.last, 60)
            saved = Saved(folder / "run")
            if self.place == "disk" and set(self.deck) & set(f.DISK):
                self.world = stack.enter_context(f.Disk(folder / "disk"))
                saved, overrides = Saved(self.world), [f"checkpoint.path={self.world}"]
            elif self.place == "store":
                self.world = stack.enter_context(f.Store())
                url = f"s3://runs/{folder.name}"
                saved, overrides = Saved(url, self.world.options), [f"checkpoint.path={url}"]
                environment = self.world.environment
            elif self.place == "hosts":
                hosts = self.world = stack.enter_context(hosts_module.Hosts(folder, 2))
            overrides.append(f"training.stop_at={self.last}")
            self.run = Run(folder, self.reference.config, saved, self.ranks, hosts, environment, overrides)
            self.pending, self.expected, self.old_marks, self.damaged = [], 0, [], {}
            self.recovering = []
            try:
                while not self._start_and_disturb():
                    self._damage()
            finally:
                self.run.all_gone(0)
            self._check_bad_steps()
        shutil.rmtree(folder)

    # ---- one start ----------------------------------------------------------------------------------------

    def _draw(self, kinds):
        if time.monotonic() > self.until:
            return None
        kind = next((k for k in self.deck if k in kinds), None)
        if kind is not None:
            self.deck.remove(kind)
        return kind

    def _start_and_disturb(self):
        """Start the run once, and inject faults until one of them ends it. Returns whether the run has finished."""
        run = self.run
        run.from_step = self.expected or 0
        run.start(restarts=self.rng.choice((0, 0, 2)) if self.place != "hosts" else 3)
        used = 0
        while not run.ended:
            kind = self._draw(f.EVERY.keys() - f.DOWN.keys())
            moment = f.Moment.draw(self.rng, self.reference.start_seconds)
            drawn = kind is not None
            if not drawn and self._draws_left():  # damage is done while the run is down
                enough = len(run.saved.committed()) > 1
                kind, moment = "sigterm-launcher", f.Moment(steps=1 if enough else 2 * INTERVAL)
            if kind is None:
                break
            if kind in f.PASSING | f.DISK | f.STORE | f.HOSTS | {"hang": 0}:
                moment = f.Moment(self.rng.uniform(0, 0.1), self.rng.randint(1, 9), kind in f.STORE)
            if not moment.reached(run, 300):
                if drawn:
                    self.deck.insert(0, kind)
                break
            outcome = Outcome(kind, self.place, str(moment))
            up, before = run.new_step() is not None, run.step()
            at = time.monotonic()
            if not self._inject(outcome, alone=used == run.last_restarts):
                if drawn:
                    self.deck.insert(0, kind)  # nothing was there to do it to
                continue
            goes_on = kind in f.PASSING | f.DISK | f.STORE | {"cable-out": 0}
            goes_on |= kind == "host-dies"
            of_rank = kind.endswith("-rank") or kind == "hang"
            if of_rank and used < run.last_restarts and self._restarts_itself():
                used += 1
                goes_on = True
                outcome.ended = "restarted by torchrun"
                resumed = run.resumed()[-1]
                outcome.steps_lost = max(0, before - resumed)
                self._bound(outcome)
                run.from_step = resumed
            if goes_on:
                self._until_new_step(max(before, run.step()) if kind in f.STORE | f.DISK | f.PASSING else 0)
                outcome.seconds = time.monotonic() - at
                self._note(outcome)
                continue
            self.pending.append((outcome, up))
            if kind.startswith("sig") and up and self.rng.random() < 0.4:
                self._kill_while_ending()
            break
        return self._after_the_end()

    def _draws_left(self):
        return bool(self.deck) and time.monotonic() <= self.until

    def _kill_while_ending(self):
        kind = self._draw([k for k in f.ENDING if k.startswith("kill-")])
        if kind is not None:
            seconds = self.rng.uniform(0, 0.5)
            time.sleep(seconds)
            outcome = Outcome(kind, self.place, f"{seconds:.1f} s after {self.pending[-1][0].kind}")
            outcome.detail = f.signal_to(self.run, self.rng, kind)
            if outcome.detail:
                self.pending.append((outcome, True))
            else:
                self.deck.insert(0, kind)

    def _until_new_step(self, step):
        deadline = time.monotonic() + PATIENCE
        while not self.run.ended and ((new := self.run.new_step()) is None or new <= step):
            require(time.monotonic() < deadline, f"no step after {step} within {PATIENCE:.0f} s")
            time.sleep(0.02)

    def _restarts_itself(self):
        """Wait, after the death of a rank, until torchrun starts all ranks again. Returns False where the run ends
        instead."""
        ups = len(self.run.resumed())
        self.run.expect_new()
        return self._comes_up(ups)

    def _comes_up(self, ups):
        """Wait until the ranks have said more than `ups` times that they carry on from a checkpoint, and have logged
        a step since. The two reports come by different ways and in any order. Returns False where the run ends
        instead."""
        run, deadline = self.run, time.monotonic() + PATIENCE
        while not run.ended:
            require(
                time.monotonic() < deadline,
                f"torchrun neither started the ranks again nor ended within {PATIENCE:.0f} s",
            )
            if len(run.resumed()) > ups and run.new_step() is not None:
                return True
            time.sleep(0.05)
        return False

    def _inject(self, outcome, alone):
        """Inject one fault. Returns False where it came too late. `alone` says that a rank that fails ends the
        command."""
        run, rng, kind = self.run, self.rng, outcome.kind
        if kind == "pause":
            stopped, seconds = f.stop_a_rank(run, rng), rng.uniform(0.2, 0.4 * TIMEOUT)
            if stopped is None:
                return False
            time.sleep(seconds)
            f.send(stopped[1], f.signal.SIGCONT)
            outcome.detail = f"{seconds:.1f} s"
        elif kind == "hang":
            stopped = f.stop_a_rank(run, rng)
            if stopped is None:
                return False
            outcome.detail = f"rank {stopped[0]}"
            if alone:
                code = run.wait(PATIENCE)
                require(code == 1, f"a rank that hangs: exit code {code}")
                paths = [p for p in (run.run_dir / "stacks").glob("rank-*.txt") if p.stem != f"rank-{stopped[0]}"]
                dumped = all("most recent call first" in path.read_text() for path in paths)
                require(paths and dumped, "a living rank has not dumped its stacks")
        elif kind in f.DISK:
            failed = getattr(f, kind.replace("-", "_"))(run, self.world)
            outcome.detail = f"{failed} saves failed"
        elif kind in f.STORE:
            seconds = rng.uniform(0.5, 5.0)
            outcome.detail = f"{seconds:.1f} s, {self.world.fail(kind, seconds)} requests"
        elif kind == "cable-out":
            seconds = rng.uniform(1, 0.4 * TIMEOUT)
            self.world.link(1, "down")
            time.sleep(seconds)
            self.world.link(1, "up")
            outcome.detail = f"{seconds:.1f} s"
        elif kind == "host-cut-off":
            self.world.link(1, "down")
            time.sleep(TIMEOUT + 3)
            outcome.detail = "for good; both hosts ended from outside"
            for host in (0, 1):
                self.world.kill(host)
            self.world.link(1, "up")
        elif kind == "host-dies":
            before = run.step()
            run.expect_new()
            self.world.kill(1)
            run.launchers.pop(1).wait()
            time.sleep(1)
            ups = len(run.resumed())
            run.launch(1)
            require(self._comes_up(ups), "the survivor's ranks did not start again")
            outcome.steps_lost, outcome.ended = before - run.resumed()[-1], "joined again"
            self._bound(outcome)
        else:
            outcome.detail = f.signal_to(run, rng, kind)
            return bool(outcome.detail)
        return True

    # ---- after it -----------------------------------------------------------------------------------------

    def _note(self, outcome):
        self.outcomes.append(outcome)
        lost = f", {outcome.steps_lost} steps lost" if outcome.steps_lost else ""
        took = f", {outcome.seconds:.1f} s" if outcome.seconds is not None else ""
        left, step = len(self.deck), self.run.step()
        what = f"{outcome.kind} ({outcome.detail}) {outcome.moment}: {outcome.ended}{lost}{took}"
        print(f"[{self.place}, {left} to come, step {step}] {what}", file=sys.stderr, flush=True)

    def _bound(self, outcome):
        """Check that no more steps were lost than allowed: two intervals, because a save waits for the one before it,
        and one more interval for each save that failed."""
        most = INTERVAL * (2 + len(f.failed_saves(self.run)))
        require(outcome.steps_lost <= most, f"{outcome.kind}: {outcome.steps_lost} steps lost, at most {most} may be")

    def _after_the_end(self):
        """Check everything once the run is down, and note what the faults cost. Returns whether the run has
        finished."""
        run, rng = self.run, self.rng
        code = run.wait(300)
        for outcome in self.recovering:
            outcome.seconds = run.recovered
        self.recovering = []
        ups = run.resumed()
        for step in self.damaged:
            self.damaged[step] |= f"DAMAGED CHECKPOINT {run.saved.root}/checkpoints/step-{step}:" in run.log()
        if ups and self.expected is not None:
            require(ups[0] == self.expected, f"carried on from step {ups[0]}, the newest was of {self.expected}")
            require(all(self.damaged.values()), f"damage of {list(self.damaged)} went unnoticed")
            self.damaged = {}
        kinds = [o.kind for o, _ in self.pending]
        if code and kinds[-1:] in (["kill-agent"], ["kill-launcher"]) and rng.random() < 0.5:
            self.old_marks.append(run.mark)  # a supervisor would not wait for what is left of it
            self.expected = None
            for outcome, _ in self.pending:
                outcome.ended = "started again at once"
                outcome.steps_lost = 0
                self._note(outcome)
            self.pending = []
            return False
        reached = run.step()
        for mark in [run.mark, *self.old_marks]:
            require(run.all_gone(60, mark) is not None, f"after {kinds}, processes were left running for 60 s")
        self.old_marks = []
        more = run.step() - reached
        require(more <= 3, f"after {kinds}, ranks whose launcher had ended trained {more} steps on")

        status, rows, saved = run.status(), run.rows(), run.saved
        reached, latest = run.step(), saved.latest()
        committed = [step for step in saved.committed() if step not in self.damaged]
        check_rows(rows, self.reference.rows, self.last if code == 0 else None)
        check_saved(saved, self.reference.saved, committed, self.folder)
        newest = latest if latest in committed else (committed[-1] if committed else 0)
        state = status.get("state")
        if code == 0:
            fine = state in ("finished", "stopped") and status["step"] == self.last == newest
            require(fine, f"exit code 0, LATEST {newest}, but status.json is {status}")
        if code == 75 or (state == "preempted" and status["time"] >= run.began_at):
            require(state == "preempted" and status["step"] == newest, f"exit code {code}, LATEST {newest}: {status}")
        # the last save of all may fail as the others do
        require(code != 2 or f.failed_saves(run), f"exit code 2 after {kinds}: {run.log()[-2000:]}")
        for outcome, up in self.pending:
            outcome.steps_lost = max(0, reached - newest)
            outcome.ended = {0: "finished", 75: "saved"}.get(code, "died")
            if outcome.kind.startswith("sig") and up and len(self.pending) == 1:
                require(code in (0, 75), f"{outcome.kind} {outcome.moment}: exit code {code}")
            self._bound(outcome)
            self._note(outcome)
            self.recovering += [outcome] if code else []
        require(self.pending or code in (0, 2), f"the run ended by itself, exit code {code}: {run.log()[-3000:]}")
        self.pending, self.expected = [], newest
        return code == 0

    def _damage(self):
        """Damage a checkpoint while the run is down."""
        saved = self.run.saved
        others = any(k not in f.DOWN for k in self.deck)
        if self.expected is None or self.damaged or (others and self.rng.random() < 0.3):
            return
        kind = self._draw(f.DOWN)
        if kind is None:
            return
        committed = saved.committed()
        if len(committed) < 2 or self.expected != committed[-1]:
            self.deck.append(kind)
            return
        outcome = Outcome(kind, self.place, "while down")
        if kind == "latest-removed":
            saved.fs.rm_file(f"{saved.root}/LATEST")
        elif kind == "latest-garbage":
            saved.fs.pipe_file(f"{saved.root}/LATEST", self.rng.randbytes(self.rng.randint(0, 20)))
            self.run.start()
            code, said = self.run.wait(240), self.run.log()
            require(code == 2, f"LATEST is garbage: exit code {code}")
            require(f"step-{committed[-1]}" in said and "Traceback" not in said, f"LATEST is garbage: it says {said}")
            saved.fs.pipe_file(f"{saved.root}/LATEST", f"step-{committed[-1]}\n".encode())  # as it says one should
            outcome.ended = "said what to write there"
        else:
            outcome.detail = f.damage(saved, committed[-1], self.rng, kind)
            self.expected, outcome.ended = committed[-2], "fell back"
            outcome.steps_lost = committed[-1] - committed[-2]
            self.damaged[committed[-1]] = False
        self._note(outcome)

    def _check_bad_steps(self):
        """Check the steps with a NaN in the data: each line about a bad step must name the same step and rank as in the
        reference."""
        said = "".join(path.read_text() for path in sorted(self.run.folder.glob("start-*.log")))
        found = bad_steps(said)
        for step, rank in self.reference.bad_steps.items():
            if step < self.last:  # the verdict on a step comes with the next
                require(found.pop(step, rank) == rank, f"bad step {step} is said to be another rank's")
                self._note(Outcome("nan-in-data", self.place, f"step {step}", f"rank {rank}", "skipped alike"))
        require(not found, f"bad steps that the reference does not have: {found}")
