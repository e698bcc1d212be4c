"""The options that several commands have, each defined once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mom_tokenizers.errors import UserError


def command_parser(documentation: str | None) -> argparse.ArgumentParser:
    """A parser whose --help prints the docstring of the command's module as it is written there."""
    return argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json [OUT]; `mom_tools.output.write_json` does what it asks for."""
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="OUT", help="write the figures as JSON to OUT, or to standard output"
    )


def add_configs(parser: argparse.ArgumentParser) -> None:
    """Add one or more configs with overrides, in any order. `configs_and_overrides` tells them apart."""
    parser.add_argument(
        "config", nargs="+", metavar="CONFIG | key=value", help="configs, and overrides that hold for all"
    )


_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")  # a key of the config and its value; a path may hold = as well


def configs_and_overrides(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """The configs and the overrides among the arguments. Raises UserError where there is no config."""
    configs = [one for one in given if Path(one).is_file() or not _OVERRIDE.match(one)]
    if not configs:
        raise UserError("no CONFIG among the arguments")
    return configs, [one for one in given if one not in configs]


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add --step and --ema, which choose weights of a run."""
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="take the average of the weights (training.ema_decay)")


def add_tokenizers(parser: argparse.ArgumentParser, purpose: str = "") -> None:
    """Add --tokenizers, the file that names a tokenizer for each modality."""
    parser.add_argument("--tokenizers", type=Path, help=f"tokenizers.yaml{purpose} (default: the run's)")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="where the model computes (default: a GPU where there is one)")


def add_input(parser: argparse.ArgumentParser) -> None:
    """Add --input, the raw documents."""
    parser.add_argument("--input", nargs="+", required=True, help="raw documents: tars, JSON lines, globs or folders")


def add_packing(parser: argparse.ArgumentParser, length: int, lanes: int) -> None:
    """Add the options that say how token shards are packed where there is no config. The arguments are the default
    values."""
    parser.add_argument(
        "--length", type=int, default=length, help="positions in a row, where no config says it (%(default)s)"
    )
    parser.add_argument(
        "--lanes", type=int, default=lanes, help="lanes of the order, where no config says it (%(default)s)"
    )
    parser.add_argument(
        "--window", type=int, default=1024, help="pieces packed together, where no config says it (%(default)s)"
    )


def named_rates(rates: Sequence[float]) -> list[float]:
    """Learning rates as the names of runs show them, to six digits, the smallest first and each once. A rate with more
    digits would not be found again among the runs that are finished."""
    return sorted({float(f"{rate:g}") for rate in rates})


def check_free(overrides: Sequence[str], own: Iterable[str]) -> None:
    """Raises UserError for a change of a key that the command sets by itself, and which would have no effect."""
    from mom_train.config.files import overridden  # here, for most commands have no changes

    given = overridden({}, overrides)
    for key in own:
        value: Any = given
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                break
            value = value[part]
        else:
            raise UserError(f"{key}: this command sets it for every run; leave it out of the changes")
