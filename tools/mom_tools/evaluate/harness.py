"""Score a model on tasks of lm-evaluation-harness, which are YAML files or come with it.

    mom lm-eval runs/demo/run --tasks my_task --include-path tasks/
    mom lm-eval exported/ --tasks lambada_openai hellaswag --num-fewshot 0 --json figures.json

RUN is the folder or URL of a run or of a checkpoint, or a folder that `mom export` wrote. Tasks that come with the
harness fetch their data from the Hugging Face hub; your own may read files (docs/how-to/evaluate.md has an example).
Needs pip install '.[lm-eval]'. Releases of the harness after 0.4.13 find the model by themselves, as `lm_eval --model
mom --model_args run=RUN`.
"""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import argparse
import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mom_tokenizers.errors import UserError, exit_clearly
from mom_tools.options import add_device, add_json, add_tokenizers, command_parser
from mom_tools.output import markdown_table, write_json
from mom_train.config.preflight import check_run, check_there, is_local

BOOTSTRAPS = 1000


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("run", help="run directory, a checkpoint's folder or URL, or a folder that mom export wrote")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names of tasks, groups or tags")
    parser.add_argument("--include-path", nargs="+", type=Path, metavar="FOLDER", help="folders with tasks of your own")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question (default: the task's)")
    parser.add_argument("--limit", type=int, help="only the first so many documents of each task")
    parser.add_argument("--step", help="checkpoint: a number, or 'best' (default: the newest)")
    parser.add_argument("--weights", choices=["model", "ema"], default="model", help="the weights, or their average")
    parser.add_argument("--max-length", type=int, help="positions read at once (default: the run's sequence length)")
    parser.add_argument("--batch", default="auto", help="requests at once, or 'auto' (default: %(default)s)")
    add_tokenizers(parser, " of the text")
    add_device(parser)
    add_json(parser)
    arguments = parser.parse_args()
    with exit_clearly():
        check(arguments)
        results = evaluate(arguments)
        if write_json(arguments.json, results):
            print(as_text(results, arguments.run))


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for what can be seen before anything large is imported."""
    for option in ("limit", "max_length"):
        if (value := getattr(arguments, option)) is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} {value}: at least 1")
    if arguments.num_fewshot is not None and arguments.num_fewshot < 0:
        raise UserError(f"--num-fewshot {arguments.num_fewshot}: not below 0")
    if arguments.step not in (None, "best") and not arguments.step.isdigit():
        raise UserError(f"--step {arguments.step}: a number, or 'best'")
    if arguments.batch != "auto" and not (arguments.batch.isdigit() and int(arguments.batch)):
        raise UserError(f"--batch {arguments.batch}: a number above 0, or 'auto'")
    folder = Path(arguments.run)
    if not (is_local(folder) and (folder / "config.yaml").is_file() and any(folder.glob("*.safetensors"))):
        check_run(arguments.run)
    check_there("--tokenizers", arguments.tokenizers)
    for place in arguments.include_path or ():
        check_there("--include-path", place)
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("mom lm-eval needs lm-evaluation-harness: pip install '.[lm-eval]'")


def find_tasks(names: Sequence[str], folders: Sequence[Path] | None) -> Any:
    """The harness's TaskManager, which knows all these tasks. Raises UserError for a task that is unknown.

    The thousands of tasks that come with the harness are read only where a name is not found in `folders`.
    """
    from lm_eval.tasks import TaskManager

    places = [str(folder) for folder in folders or ()]
    if places and not missing(own := TaskManager(include_path=places, include_defaults=False), names):
        return own
    manager = TaskManager(include_path=places or None)
    if unknown := missing(manager, names):
        close = {name: difflib.get_close_matches(name, manager.all_tasks, 3) for name in unknown}
        said = [f"'{name}'" + (f" (did you mean {', '.join(near)}?)" if near else "") for name, near in close.items()]
        where = f", neither in {', '.join(places)} nor among those of the harness" if places else ""
        raise UserError(f"--tasks: there is no task {', '.join(said)}{where}")
    return manager


def missing(manager: Any, names: Sequence[str]) -> list[str]:
    return [name for name in names if not manager.match_tasks([name])]


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """The results of the harness without the samples, as JSON values."""
    import json

    manager = find_tasks(arguments.tasks, arguments.include_path)
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    from mom_tools.evaluate.harness_model import HarnessModel

    step = arguments.step if arguments.step in (None, "best") else int(arguments.step)
    model = HarnessModel(
        arguments.run,
        step,
        arguments.weights,
        arguments.tokenizers,
        batch_size=arguments.batch,
        device=arguments.device,
        max_length=arguments.max_length,
    )
    found = simple_evaluate(
        model=model,
        tasks=list(arguments.tasks),
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        task_manager=manager,
        bootstrap_iters=BOOTSTRAPS,
        log_samples=False,
    )
    kept = {name: found[name] for name in ("results", "groups", "n-shot", "n-samples", "versions") if name in found}
    return dict(json.loads(json.dumps({"model": arguments.run, **kept}, default=handle_non_serializable)))


def as_text(results: dict[str, Any], run: str) -> str:
    """The results as a Markdown table."""
    rows = []
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, _, by = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not by:
                continue
            error = values.get(f"{metric}_stderr,{by}")
            shown = f"{error:.4f}" if isinstance(error, int | float) else "-"
            samples = results.get("n-samples", {}).get(task, {}).get("effective", "")
            title = metric if by == "none" else f"{metric} ({by})"
            rows.append([task, title, f"{value:.4f}", shown, str(samples)])
    table = markdown_table(["task", "metric", "value", "standard error", "documents"], rows, left=2)
    return f"{run}\n\n{table}"


if __name__ == "__main__":
    main()
