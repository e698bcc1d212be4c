"""The command line, python -m torchrun_launch local|submit|status|logs|cancel: start a training run, and watch it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from mom_tokenizers.errors import UserError, write_text


def main() -> None:
    prog = "mom" if Path(sys.argv[0]).name == "mom" else "torchrun_launch"
    parser = argparse.ArgumentParser(prog=prog, description="Start the ranks of a training run.")
    commands = parser.add_subparsers(dest="command", required=True)
    local = commands.add_parser("local", help="start a run on this machine, or on several without Slurm")
    local.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks (default: one per GPU, or one)")
    local.add_argument(
        "--nnodes", default="1", metavar="N|MIN:MAX", help="number of machines; the command must run on each"
    )
    local.add_argument(
        "--node-rank", type=int, default=0, metavar="K", help="number of this machine; 0 holds the rendezvous"
    )
    local.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="address of the machine with node rank 0")
    local.add_argument("--rdzv-id", default="mom", metavar="NAME", help="name of the run, the same on all its machines")
    local.add_argument(
        "--rdzv-timeout", type=int, default=600, metavar="S", help="seconds within which all machines must meet"
    )
    local.add_argument("--max-restarts", type=int, default=0, metavar="N", help="how often to restart ranks that fail")
    local.add_argument(
        "--shutdown-timeout",
        type=float,
        default=300,
        metavar="S",
        help="seconds that ranks have to save after a signal",
    )
    _add_config(local)

    submit = commands.add_parser("submit", help="submit to Slurm a job that saves, requeues and resumes by itself")
    submit.add_argument("--nodes", type=int, required=True, metavar="N", help="number of nodes")
    submit.add_argument(
        "--gpus-per-node", type=int, required=True, metavar="G", help="GPUs of a node, 0 where there are none"
    )
    submit.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks (default: one per GPU, or one)")
    submit.add_argument("--cpus-per-task", type=int, metavar="N", help="CPU cores per node")
    submit.add_argument("--time", default="24:00:00", help="time limit of one attempt, as in sbatch (%(default)s)")
    for name, what in {
        "name": "name of the job", "partition": "Slurm partition of the job", "account": "Slurm account of the job",
        "qos": "Slurm quality of service of the job", "constraint": "features that the nodes must have, as in sbatch",
        "exclude": "nodes that the job must not use, as in sbatch",
    }.items():  # fmt: skip
        submit.add_argument(f"--{name}", help=what)
    submit.add_argument("--container-image", help="image for pyxis, as in srun --container-image")
    submit.add_argument("--container-mounts", metavar="FROM:TO,...", help="mounts besides the run's own folders")
    submit.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="a further option of sbatch; may be given several times",
    )
    submit.add_argument(
        "--signal-delay", type=int, default=120, metavar="S", help="seconds to save in before --time ends"
    )
    submit.add_argument("--max-requeues", type=int, default=100, metavar="N", help="most attempts after the first")
    submit.add_argument(
        "--max-restarts", type=int, default=3, metavar="N", help="most restarts of the ranks within one attempt"
    )
    submit.add_argument(
        "--rdzv-timeout", type=int, default=300, metavar="S", help="seconds in which all nodes must meet"
    )
    submit.add_argument(
        "--sweep", metavar="'configs/*.yaml'", help="submit a job array, with a task per config, instead of CONFIG"
    )
    submit.add_argument("--array-parallelism", type=int, default=256, metavar="N", help="most tasks that run at a time")
    submit.add_argument("--dry-run", action="store_true", help="print the batch script and submit nothing")
    _add_config(submit, optional=True)

    status = commands.add_parser("status", help="show a run's job or process, step, losses, tokens/s, time left")
    status.add_argument("--json", nargs="?", const="-", metavar="OUT", help="write JSON to OUT or standard output")
    logs = commands.add_parser("logs", help="print the output of a run's ranks, each line with its rank")
    logs.add_argument("-f", "--follow", action="store_true", help="print new lines until the run ends")
    logs.add_argument("--rank", type=int, metavar="K", help="print only the lines of this rank")
    cancel = commands.add_parser("cancel", help="end a run and wait until it has ended")
    for command in (status, logs, cancel):
        command.add_argument("run", type=Path, metavar="RUN", help="the run's directory (run_dir)")
    arguments = parser.parse_args()

    from mom_tokenizers.errors import exit_clearly

    with exit_clearly():
        sys.exit(_COMMANDS[arguments.command](arguments))


def _add_config(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.add_argument("config", nargs="?" if optional else None, help="YAML file, such as configs/demo.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes of the config, such as training.steps=100"
    )


def _local(arguments: argparse.Namespace) -> int:
    from torchrun_launch.local import launch

    return launch(
        arguments.config,
        arguments.overrides,
        os.environ,
        ranks=arguments.nproc_per_node,
        nodes=arguments.nnodes,
        node_rank=arguments.node_rank,
        endpoint=arguments.rdzv_endpoint,
        run_id=arguments.rdzv_id,
        max_restarts=arguments.max_restarts,
        command=sys.argv[1:],
        rendezvous_timeout=arguments.rdzv_timeout,
        shutdown_timeout=arguments.shutdown_timeout,
    )


def _submit(arguments: argparse.Namespace) -> int:
    from torchrun_launch import submit

    configs, overrides = [arguments.config], arguments.overrides
    if arguments.sweep is not None:  # then the argument in the place of CONFIG is an override too
        configs, overrides = submit.sweep(arguments.sweep), [o for o in (arguments.config, *overrides) if o is not None]
    elif arguments.config is None:
        raise UserError("submit: name a CONFIG, or several with --sweep")
    given = {key: value for key, value in vars(arguments).items() if key in submit.Request.__dataclass_fields__}
    given["sbatch"] = dict(_option(text) for text in arguments.sbatch)
    given["nproc_per_node"] = arguments.nproc_per_node or arguments.gpus_per_node or 1
    given["rendezvous_timeout"] = arguments.rdzv_timeout
    request = submit.Request(**given)
    done = submit.submit(configs, overrides, request, sys.argv[1:], arguments.dry_run)
    if arguments.dry_run:
        print(done["script"])
    for run_dir, job in done["jobs"].items():
        print(f"# would train {run_dir}" if job is None else f"job {job} trains {run_dir}")
    return 0


def _option(text: str) -> tuple[str, Any]:
    name, separator, value = text.removeprefix("--").partition("=")
    return name, value if separator else True


def _status(arguments: argparse.Namespace) -> int:
    from torchrun_launch.watch import describe, status

    found = status(arguments.run)
    if arguments.json is None:
        print(describe(found))
    elif arguments.json == "-":
        print(json.dumps(found, indent=1))
    else:
        write_text(arguments.json, json.dumps(found, indent=1) + "\n")
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from torchrun_launch.watch import logs

    try:
        for line in logs(arguments.run, arguments.rank, arguments.follow):
            print(line, flush=True)
    except KeyboardInterrupt:
        pass
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    from torchrun_launch.watch import cancel

    print(cancel(arguments.run))
    return 0


_COMMANDS = {"local": _local, "submit": _submit, "status": _status, "logs": _logs, "cancel": _cancel}

if __name__ == "__main__":
    main()
