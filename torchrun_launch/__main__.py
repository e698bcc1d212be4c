"""python -m torchrun_launch local --nproc-per-node 2 CONFIG [key=value ...]"""

from __future__ import annotations

import argparse
import os
import sys


def main() -> None:
    parser = argparse.ArgumentParser(prog="torchrun_launch", description="Start the ranks of a training run.")
    commands = parser.add_subparsers(dest="command", required=True)
    local = commands.add_parser("local", help="on this machine, through torchrun")
    local.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks (default: one per GPU, or one)")
    local.add_argument("config", help="YAML file, such as configs/demo.yaml")
    local.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.steps=100")
    arguments = parser.parse_args()

    from mom_data.errors import exit_clearly

    with exit_clearly("torchrun_launch"):
        from torchrun_launch.local import launch

        sys.exit(launch(arguments.config, arguments.overrides, arguments.nproc_per_node, os.environ))


if __name__ == "__main__":
    main()
