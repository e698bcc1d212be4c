"""Write one HTML page about one or more runs: what was trained, on which data, how it went and what it cost.

    mom report runs/demo/run --output report.html
    mom report runs/dense-0 runs/dense-1 runs/mixture-0 runs/mixture-1 --price 2.5

Runs that differ in nothing but their seed are one model; the first model is the baseline that the others are compared
with, as `mom match-loss` does. The page needs no network, and leaves out what a run's directory does not hold.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mom_tokenizers.errors import UserError, exit_clearly, write_text
from mom_tools.compare.charts import Series, chart
from mom_tools.compare.curves import AXES, WINDOW, Run, compare, smoothed, tokens_of
from mom_tools.compare.match_loss import HEADER, cells, notes
from mom_tools.compare.page import media, parts_of, rendered
from mom_tools.options import command_parser
from mom_train.baseline import read_baseline, unigram, write_baseline
from mom_train.config.files import load_config
from mom_train.distributed.status import read_status
from mom_train.observe.goodput import PARTS, goodput

_POINTS = 400  # of a curve
_SAMPLES = 3  # newest steps whose samples are shown


def flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as one mapping of dotted keys to texts."""
    if isinstance(values, dict) and values:
        return {k: v for key, inner in values.items() for k, v in flat(inner, f"{prefix}{key}.").items()}
    if isinstance(values, list) and all(not isinstance(v, dict | list) for v in values):
        return {prefix[:-1]: ", ".join(map(str, values)) or "none"}
    if isinstance(values, list):
        return {k: v for i, inner in enumerate(values) for k, v in flat(inner, f"{prefix}{i}.").items()}
    return {prefix[:-1]: "" if values is None else str(values)}


def json_or_none(path: Path) -> Any:
    """The value in a JSON file, or None where there is no such file, or where a crash has cut it short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


# ---- one run -------------------------------------------------------------------------------------------------


def seconds_of(run: Run) -> float:
    """The seconds spent in training: the tokens between two logged lines, divided by the speed that the second line
    has."""
    before, spent = 0.0, 0.0
    for line in run.lines:
        if line.get("perf/tokens_per_s"):
            now = sum(tokens_of(line).values())
            spent += (now - before) / line["perf/tokens_per_s"]
            before = now
    return spent


def middle(run: Run, name: str) -> float | None:
    values = [line[name] for line in run.lines if name in line]
    return statistics.median(values) if values else None


def facts(run: Run, price: float | None) -> dict[str, Any]:
    """The figures of a run that the tables of the page show."""
    last: dict[str, float] = next((line for line in reversed(run.lines) if tokens_of(line)), {})
    environment = json_or_none(run.path / "environment.json") or {}
    world = environment.get("world_size") if isinstance(environment, dict) else None
    tokens, spent = tokens_of(last), seconds_of(run)
    # the last checkpoint's is logged until the next one
    stalls = [k for k, _ in itertools.groupby(line.get("checkpoint/stall_s", 0) for line in run.lines) if k]
    hours = spent * (world or 1) / 3600
    total = sum(tokens.values())
    found = {
        "state": read_status(run.path),
        "step": int(last.get("step", 0)),
        "tokens": tokens,
        "flops": last.get("flops/total"),
        "seconds": spent,
        "tokens_per_s": middle(run, "perf/tokens_per_s"),
        "goodput": goodput(run.path),
        "mfu": middle(run, "perf/mfu"),
        "data_wait": middle(run, "perf/data_wait"),
        "straggling": middle(run, "perf/straggling"),
        "stalls": {"count": len(stalls), "median": statistics.median(stalls), "most": max(stalls)} if stalls else None,
        "skipped": max((line.get("anomaly/skipped", 0) for line in run.lines), default=0),
        "damaged": last.get("data/damaged", 0),
        "tokens_per_hour": 3600 * total / spent if spent else None,
        "device_hours": hours,
        "world": world,
        "branch": run.config.get("branch"),
        "cost": None if price is None else price * hours,
        "cost_per_billion": price * hours * 1e9 / total if price is not None and total else None,
        "environment": flat(environment) if environment else {},
        "incident": json_or_none(run.path / "incident.json"),
        "rollbacks": rollbacks(run.path / "rollbacks.jsonl"),
        "stacks": sorted(p.name for p in run.path.glob("stacks/*.txt") if p.stat().st_size),
    }
    return found


def rollbacks(path: Path) -> list[Any]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.strip()]


def samples(run: Run) -> list[dict[str, Any]]:
    """The newest sampled generations: RUN/samples/step-N/, then what `mom generate` left in RUN/samples.

    Each has parts in the order in which they were made: text, pictures and recordings as they stand in it, and ids
    by their file's name. Nothing of a sample is cut; a file above 16 MB is named in its place.
    """
    folder = run.path / "samples"
    steps = sorted(folder.glob("step-*"), key=lambda p: int(p.name[5:]) if p.name[5:].isdigit() else -1)
    places = [*steps[-_SAMPLES:][::-1], *([folder] if folder.is_dir() else [])]
    return [{"name": place.name, "parts": parts} for place in places if (parts := _parts(place))]


def round_trips(run: Run) -> list[dict[str, Any]]:
    """The documents of RUN/round_trip, where each picture and recording stands before and after the tokenizers."""
    folder = run.path / "round_trip"
    return _parts(folder) if folder.is_dir() else []


def _parts(place: Path) -> list[dict[str, Any]]:
    """What a folder of documents in Markdown holds, in its order, and then the files that none of them names."""
    files = {p.name: p for p in sorted(place.iterdir()) if p.is_file()}
    parts: list[dict[str, Any]] = []
    shown = set()
    for file in files.values():
        if file.suffix in (".txt", ".md"):
            for part, name in parts_of(file.read_text(errors="replace"), files, file.name):
                parts.append(part)
                shown.add(name)
    for name in sorted(files.keys() - shown):
        parts += media(files[name])
    return parts


def scored(run: Run) -> list[dict[str, Any]]:
    """What `mom score` left in RUN/scores/step-N/scores.json, the newest step first: its name, rows and notes."""
    found = []
    for file in run.path.glob("scores/*/scores.json"):
        figures = json_or_none(file)
        if isinstance(figures, dict) and isinstance(figures.get("scores"), list):
            found.append({"name": file.parent.name, **{key: figures.get(key) for key in ("step", "scores", "notes")}})
    return sorted(found, key=lambda one: -(one["step"] or 0))


# ---- curves --------------------------------------------------------------------------------------------------


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float]]:
    keep = np.unique(np.linspace(0, max(0, len(x) - 1), min(len(x), _POINTS)).astype(int))
    return x[keep].tolist(), y[keep].tolist()


def loss_charts(runs: Sequence[Run], axis: str) -> dict[str, str]:
    """Modality -> its chart: single training losses, the smoothed training loss above them, and validation losses as
    dots."""
    names = list(dict.fromkeys(name for run in runs for name in run.names))
    modalities = list(dict.fromkeys(name.rpartition("/")[2] for name in names))
    charts = {}
    for modality in modalities:
        series = []
        for number, run in enumerate(runs):
            for name in run.names:
                if name.rpartition("/")[2] != modality:
                    continue
                x, y = run.over(name, axis)
                if name.startswith("val/"):
                    series.append(Series(*thinned(x, y), number, "dots", f"{run.path}: {name}"))
                    continue
                if len(runs) == 1:
                    series.append(Series(*thinned(x, y), number, "faint", ""))
                series.append(Series(*thinned(x, smoothed(x, y, WINDOW)), number, "line", f"{run.path}: {name}"))
        charts[modality] = chart(modality, series, AXES[axis])
    return charts


def value_charts(runs: Sequence[Run], wanted: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Title -> chart, for each of the `wanted` (logged name, title) that a run has logged."""
    charts = {}
    for name, title in wanted:
        series = []
        for number, run in enumerate(runs):
            x, y = run.over(name, "steps")
            if len(x):
                drawn = y if name in ("learning_rate", "batch") else smoothed(x, y, WINDOW)
                series.append(Series(*thinned(x, drawn), number, "line", str(run.path)))
        if series:
            charts[title] = chart(title, series, "steps", from_zero=True)
    return charts


# ---- several runs --------------------------------------------------------------------------------------------


def models(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs grouped by model, in the order given. Runs that differ only in seed and folder belong to one model."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        what = {k: v for k, v in run.config.items() if k not in ("seed", "run_dir")}
        groups.setdefault(json.dumps(what, sort_keys=True, default=str) if what else str(run.path), []).append(run)
    return list(groups.values())


def comparisons(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The comparison of every other model with the first, or the reason why they cannot be compared."""
    baseline, *others = models(runs)
    found: list[dict[str, Any]] = []
    for other in others:
        entry: dict[str, Any] = {"baseline": [runs.index(r) for r in baseline]}
        entry["candidate"] = [runs.index(r) for r in other]
        try:
            results = compare(baseline, other)
            entry |= {"rows": [cells(name, x)[:5] for name, x in results.items()], "notes": notes(results, WINDOW)}
        except ValueError as error:
            entry["why"] = str(error)
        found.append(entry)
    return found


def labels(runs: Sequence[Run]) -> list[str]:
    """The names of the runs: their paths without the part that all share, or the last two parts of a single run's
    path."""
    paths = [run.path.absolute() for run in runs]
    shared = len(Path(os.path.commonpath(paths)).parts) if len(paths) > 1 else len(paths[0].parts) - 2
    return ["/".join(p.parts[min(shared, len(p.parts) - 1) :]) for p in paths]


def validation_table(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Loss -> (final, best, step of the best) of each run, or None where a run has no such loss."""
    names = dict.fromkeys(n for run in runs for line in run.lines for n in line if n.startswith("val/"))
    table: dict[str, list[Any]] = {}
    for name in names:
        table[name] = []
        for run in runs:
            seen = [(line[name], line["step"]) for line in run.lines if name in line]
            table[name].append((seen[-1][0], *min(seen)) if seen else None)
    return table


def baseline_of(run: Run) -> dict[str, float]:
    """Validation loss, as the run names it -> loss of the unigram baseline, which is computed where it does not exist
    yet."""
    found = read_baseline(run.path)
    if not found and run.config:
        try:
            found = unigram(load_config(run.path / "config.yaml"))
            write_baseline(run.path, found)
        except UserError as error:
            print(f"{run.path}: no unigram baseline, which counts in the run's data: {error}", file=sys.stderr)
    return {f"val/{name}/loss/{m}": loss for name, losses in found.items() for m, loss in losses.items()}


def differences(runs: Sequence[Run]) -> tuple[dict[str, list[str | None]], list[dict[str, str]]]:
    """(config keys in which runs differ -> the value of each run, the whole config of every run)."""
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    differing = {k: [c.get(k) for c in configs] for k in keys if len({c.get(k) for c in configs}) > 1}
    return differing, configs


def page(runs: Sequence[Run], price: float | None = None) -> str:
    """The report. Raises ValueError for a directory that is not a run's."""
    for run in runs:
        _ = run.lines
    differing, configs = differences(runs)
    wanted = [("perf/tokens_per_s", "tokens per second"), ("perf/data_wait", "share of time waiting for data")]
    wanted += [("grad_norm/total", "gradient norm"), ("learning_rate", "learning rate"), ("perf/mfu", "MFU")]
    wanted += [("batch", "batch")]
    return rendered(
        Path(__file__).with_name("report.html"),
        runs=[
            {"path": str(run.path), "label": l, **facts(run, price)} for run, l in zip(runs, labels(runs), strict=True)
        ],
        losses={axis: loss_charts(runs, axis) for axis in AXES},
        axes=AXES,
        values=value_charts(runs, wanted),
        validation=validation_table(runs),
        baselines=[baseline_of(run) for run in runs],
        header=HEADER[:5],
        comparisons=comparisons(runs),
        differing=differing,
        configs=configs,
        sources=[run.config.get("data", {}).get("train", []) for run in runs],
        samples=[samples(run) for run in runs],
        round_trips=[round_trips(run) for run in runs],
        captions=[media(run.path / "captions.png") if (run.path / "captions.png").is_file() else [] for run in runs],
        scored=[scored(run) for run in runs],
        parts=PARTS,
        modalities=list(dict.fromkeys(m for run in runs for line in run.lines[-1:] for m in tokens_of(line))),
        price=price,
        window=100 * WINDOW,
    )


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories; the first is the baseline")
    parser.add_argument(
        "--output", type=Path, help="the page (default: RUN/report.html, or report.html for several runs)"
    )
    parser.add_argument("--price", type=float, help="price of one device (rank) for an hour, in any currency")
    arguments = parser.parse_args()
    with exit_clearly():
        if arguments.price is not None and not 0 <= arguments.price < math.inf:
            raise UserError(f"--price {arguments.price}: not below 0, and finite")
        html = page([Run(path) for path in arguments.runs], arguments.price)
        alone = len(arguments.runs) == 1
        output = arguments.output or (arguments.runs[0] / "report.html" if alone else Path("report.html"))
        write_text(output, html)
        print(f"{output}: {len(html) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
