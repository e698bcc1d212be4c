"""List, verify, average or prune the checkpoints of a run, or export the weights of one.

    mom checkpoint RUN list [--json [OUT]]
    mom checkpoint RUN verify [--step N] [--json [OUT]]
    mom checkpoint RUN prune --keep 3
    mom checkpoint RUN average --last 5 --out averaged/ [--steps 100,200,300] [--shape sqrt]
    mom checkpoint RUN export --out exported/ [--step N] [--ema] [--format transformers]

RUN is a run's folder, or the URL that its checkpoints are under (s3://bucket/run). `verify` reads every byte and ends
with exit code 2 where a checkpoint has changed since it was written; `list` looks at sizes only. `prune` keeps the
newest K, the best and the permanent checkpoints (checkpoint.keep_every), and removes saves that did not finish. It
holds RUN/lock meanwhile, so that it cannot remove a save that a run is still writing. `average` writes the mean of the
weights as a run of its own, which can be evaluated, exported and named in init_from, but not trained on, because it has
no state of an optimiser. Its shape says which decay of the learning rate it emulates: linear is the plain mean.
"""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.model.export_model import add_options, export
from mom_tools.options import add_json, command_parser
from mom_tools.output import write_json
from mom_train.config.preflight import check_run, check_writable, is_local
from mom_train.distributed.run_lock import RunLock

if TYPE_CHECKING:  # torch takes seconds: it comes when the arguments are known to be right
    from mom_train.checkpoint.store import Checkpoint, Checkpoints


def describe(checkpoint: Checkpoint, latest: Checkpoint | None, best: Checkpoint | None) -> dict[str, Any]:
    """One line of `list`. `bytes` is the size of the files that are there, and `problems` has what can be found without
    reading them all."""
    files, path = checkpoint.files, checkpoint.path
    there = {name: files.size(f"{path}/{name}") for name in files.names(path)}
    entry: dict[str, Any] = {
        "step": checkpoint.step,
        "path": path,
        "bytes": sum(there.values()),
        "committed": checkpoint.committed,
        "latest": latest is not None and checkpoint.step == latest.step,
        "best": best is not None and checkpoint.step == best.step,
        "permanent": False,
        "problems": [],
    }
    if checkpoint.damaged:
        entry["problems"].append("a run found it damaged and fell back to an older one")
    if not entry["committed"]:
        return entry
    try:
        entry["permanent"] = checkpoint.permanent(checkpoint.keep_every())
        for name, want in checkpoint.sums().items():
            if there.get(name) != want.size:
                entry["problems"].append(f"{name} has {there.get(name, 0):,} bytes instead of {want.size:,}")
    except UserError as error:
        entry["problems"].append(str(error))
    return entry


def as_text(entries: list[dict[str, Any]]) -> str:
    lines = [f"{'step':>10} {'MB':>10}  state"]
    for e in entries:
        words = ["committed" if e["committed"] else "not committed"]
        words += [word for word in ("latest", "best", "permanent") if e[word]]
        words += [f"verified: {e['verified']}"] if "verified" in e else []
        lines.append(f"{e['step']:>10} {e['bytes'] / 1e6:>10,.1f}  {', '.join([*words, *e['problems']])}")
    return "\n".join(lines)


def verify(checkpoint: Checkpoint) -> list[str]:
    try:
        total = sum(s.size for s in checkpoint.sums().values())
    except UserError:
        total = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc=checkpoint.name, disable=None) as bar:
        return checkpoint.damage(progress=bar.update)


@contextmanager
def held(run: str, checkpoint: Checkpoint) -> Iterator[None]:
    """A context in which nobody else trains in the run's folder. `run` may be the place of its checkpoints instead,
    so the folder that the checkpoint names is held as well, where it exists. Raises UserError where somebody trains
    there."""
    run_dir = (checkpoint.train_state().get("config") or {}).get("run_dir", "")
    places = {Path(place).resolve() for place in (run, run_dir) if place and is_local(place) and Path(place).is_dir()}
    with ExitStack() as stack:
        for place in sorted(places):
            stack.enter_context(RunLock(place))
        yield


def chosen_for_average(checkpoints: Checkpoints, last: int | None, steps: str | None) -> list[Checkpoint]:
    """The checkpoints to average. Raises UserError where there are not so many, or not these."""
    if steps is not None:
        parts = steps.split(",")
        if not all(part.strip().isdigit() for part in parts) or len(set(map(int, parts))) < len(parts):
            raise UserError(f"--steps {steps}: expected different steps with commas between them, such as 100,200,300")
        return [checkpoints.find(int(part)) for part in parts]
    there = checkpoints.committed()
    if last is None or not 2 <= last <= len(there):
        raise UserError(f"--last {last}: at least 2, and there are {len(there)} checkpoints")
    return there[-last:]


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("run", help="run directory, or the URL of its checkpoints")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("list", "verify"):
        command = commands.add_parser(name)
        add_json(command)
    command.add_argument("--step", type=int, help="step of the checkpoint to verify (default: all committed ones)")
    command = commands.add_parser("prune")
    command.add_argument("--keep", type=int, required=True, help="number of newest checkpoints to keep")
    command = commands.add_parser("average")
    chosen_by = command.add_mutually_exclusive_group(required=True)
    chosen_by.add_argument("--last", type=int, metavar="K", help="the newest K checkpoints")
    chosen_by.add_argument("--steps", metavar="A,B,C", help="the checkpoints of these steps")
    command.add_argument("--shape", choices=("linear", "sqrt"), default="linear", help="(default: %(default)s)")
    command.add_argument("--out", type=Path, required=True, help="folder of the result, not there yet")
    command = commands.add_parser("export")
    add_options(command)
    arguments = parser.parse_args()
    with exit_clearly():
        check_run(arguments.run)
        if arguments.command == "prune" and arguments.keep < 1:
            raise UserError("--keep: at least 1, which the run carries on from")
        if arguments.command in ("export", "average"):
            check_writable(arguments.out, "--out")
        from mom_train.checkpoint.store import Checkpoints

        checkpoints = Checkpoints.of(arguments.run)
        if arguments.command == "export":
            export(arguments.run, arguments.out, arguments.step, arguments.format, arguments.ema)
            return
        if arguments.command == "average":
            from mom_train.checkpoint.average import average

            print(
                average(
                    chosen_for_average(checkpoints, arguments.last, arguments.steps), arguments.shape, arguments.out
                )
            )
            return
        latest, best = checkpoints.latest(), checkpoints.best()
        if arguments.command == "prune":
            newest = checkpoints.find()
            with held(arguments.run, newest):
                removed = checkpoints.clean() + checkpoints.prune(newest.step, arguments.keep, newest.keep_every())
            for checkpoint in removed:
                print(f"removed {checkpoint}")
            return
        chosen = checkpoints.all()
        if arguments.command == "verify":
            step = arguments.step
            chosen = [c for c in chosen if c.committed] if step is None else [checkpoints.find(step)]
        entries = [describe(checkpoint, latest, best) for checkpoint in chosen]
        if arguments.command == "verify":
            for entry, checkpoint in zip(entries, chosen, strict=True):
                entry["problems"] = verify(checkpoint)
                entry["verified"] = not entry["problems"]
        write_json(arguments.json, entries)
        if arguments.json is None:
            print(as_text(entries))
        damaged = [e["path"] for e in entries if e.get("verified") is False]
        if damaged:
            raise UserError(f"damaged: {', '.join(damaged)}")


if __name__ == "__main__":
    main()
