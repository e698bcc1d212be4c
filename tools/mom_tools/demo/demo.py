"""Run the whole job on this machine, from raw documents to a trained model. `make demo` runs this.

    mom demo                       # on a corpus built from what the machine has
    mom demo --corpus raw/         # on your own raw shards

A stage that is finished is not done again; remove its folder to repeat it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mom_data.documents.document import expand_inputs
from mom_data.documents.inputs import files_of_side, modalities_at_the_head
from mom_data.shards.content import keep_inputs
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import EXIT_USER_ERROR, exit_clearly
from mom_tokenizers.files import read_yaml
from mom_tokenizers.speech.codecs import CODECS
from mom_tools.data.mixture import sources
from mom_tools.demo.gallery import write_round_trips
from mom_tools.options import command_parser
from mom_train.baseline import unigram, write_baseline
from mom_train.config.files import load_config
from mom_train.config.run import RunConfig
from mom_train.distributed.status import read_status
from mom_train.observe.metrics import read_metrics

_started = time.perf_counter()
# of the tokens: text, which is cheapest to store, would otherwise leave little room for the rest. With fewer pictures,
# captions do not decide what is drawn (docs/results/log.md, 2026-11-29).
SHARES = {"text": 0.35, "image": 0.5, "speech": 0.15}
VOCODER_STEPS = 150  # 43 CPU-seconds; docs/how-to/speech-as-sound.md has what they gain


@contextmanager
def stage(title: str) -> Iterator[None]:
    begun = time.perf_counter()
    print(f"\n=== {title}", flush=True)
    yield
    print(f"    {time.perf_counter() - begun:.0f} s ({time.perf_counter() - _started:.0f} s in all)", flush=True)


def call(*command: str | Path, threads: int | None = None, quiet: bool = False) -> None:
    """Run a command of `mom`. Its own message says what went wrong."""
    output = subprocess.DEVNULL if quiet else None
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    done = subprocess.run([sys.executable, "-m", "mom_tools", *map(str, command)], env=environment, stdout=output)
    if done.returncode:
        raise SystemExit(EXIT_USER_ERROR if done.returncode == EXIT_USER_ERROR else 1)


def present_modalities(corpus: Path) -> list[str]:
    """The modalities in the first documents of the training files, text first."""
    files, _ = files_of_side([str(corpus)], "train")
    found = {"text", *modalities_at_the_head(files)}
    return sorted(found, key=lambda modality: (modality != "text", modality))


def speaks_by_centroids(speech: dict[str, Any] | None) -> bool:
    """Whether units of this recipe need a vocoder, and it names none."""
    return speech is not None and speech.get("extractor", "log_mel") not in CODECS and not speech.get("vocoder")


def finished(config: RunConfig) -> bool:
    """Whether the run has ended at its last step with this config. The objective is left out of the comparison, because
    a run adds the scale of its latents to it."""
    status, resolved = read_status(config.run_dir), config.run_dir / "config.yaml"
    if status is None or status["state"] != "finished" or not resolved.exists():
        return False
    return load_config(resolved).model_dump(exclude={"objective"}) == config.model_dump(exclude={"objective"})


def report(config: RunConfig, baseline: dict[str, float], name: str) -> str:
    """The table at the end of the demo."""
    lines = read_metrics(config.run_dir)
    first, last = lines[0], lines[-1]
    columns = [m for m in (*config.layout.modalities, "total") if f"val/{name}/loss/{m}" in last]
    speed = statistics.median(line["perf/tokens_per_s"] for line in lines if "perf/tokens_per_s" in line)
    tokens = {m: int(last[f"tokens/{m}"]) for m in config.layout.modalities}
    rows = {
        "unigram baseline": [baseline[c] for c in columns],
        "held out, at the start": [first[f"val/{name}/loss/{c}"] for c in columns],
        "held out, at the end": [last[f"val/{name}/loss/{c}"] for c in columns],
        "training, last 20 steps": [
            statistics.mean(v for line in lines[-20:] if (v := line.get(f"loss/{c}")) is not None) for c in columns
        ],
    }
    diffusion = config.objective.diffusion
    text = [f"{'loss (nats per token)':26}" + "".join(f"{c:>10}" for c in columns)]
    text += [f"{title:26}" + "".join(f"{v:10.3f}" for v in values) for title, values in rows.items()]
    if diffusion is not None:
        text.append(f"image: squared error per value of a latent patch; total: entropy + {diffusion.weight:g} x image")
    seen = ", ".join(f"{n:,} {m}" for m, n in tokens.items())
    return "\n".join(
        [
            *text,
            "",
            f"tokens seen    {sum(tokens.values()):,} ({seen}) in {int(last['step'])} steps",
            f"FLOPs spent    {last['flops/total']:.3g}",
            f"speed          {speed:,.0f} tokens/s (median)",
        ]
    )


def captions_heeded(run: Path) -> str:
    """A table of how many pictures show what their captions say. The pictures are in RUN/captions.png. Empty where the
    run has no pictures to draw."""
    from mom_tools.demo.captions import measure, table  # here, for it imports scikit-learn

    if (measured := measure(run)) is None:
        return ""
    hits, sheet = measured
    sheet.save(run / "captions.png")
    return table(hits) + "\n"


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--corpus", type=Path, help="folder of raw tars (with train/ and val/ inside, if it has them)")
    parser.add_argument("--work", type=Path, help="folder for all that is made (default: runs/demo[-CORPUS])")
    parser.add_argument("--config", default="configs/demo.yaml", help="config of the run (default: %(default)s)")
    parser.add_argument("--tokenizers", default="configs/demo_tokenizers.yaml", help="recipe (default: %(default)s)")
    parser.add_argument("--documents", type=int, help="number of documents in the corpus that is built")
    parser.add_argument(
        "--vocoder",
        type=int,
        metavar="STEPS",
        help=f"steps that train a vocoder of the speech units, 0 for none (default: {VOCODER_STEPS}, and none with "
        "--corpus)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of the run's config, such as training.steps=50"
    )
    arguments = parser.parse_args()
    with exit_clearly():
        demo(arguments)


def demo(arguments: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0))
    corpus: Path | None = arguments.corpus and arguments.corpus.expanduser()  # make quotes it
    work: Path = arguments.work or Path("runs") / (f"demo-{corpus.resolve().name}" if corpus else "demo")
    work.mkdir(parents=True, exist_ok=True)

    if corpus is None:
        raw = work / "raw"
        with stage("1/5 corpus: text, digits, emoji and speech, from what this machine has"):
            size = ["--documents", str(arguments.documents)] if arguments.documents else []
            call("demo-corpus", "--output", raw, *size)
    else:
        raw = corpus
        files_of_side([str(raw)], "train")
        keep_inputs(work, expand_inputs([str(raw)]))

    with stage("2/5 tokenizers: byte-level BPE, image codes or latents, speech units and their vocoder"):
        wanted = read_yaml(arguments.tokenizers)
        found = present_modalities(raw)
        recipe = work / "tokenizers.yaml"
        # The recipe decides: what it has no tokenizer for is left out on purpose, not by mistake.
        dropped = [m for m in found if m not in wanted]
        found = [m for m in found if m in wanted]
        if dropped:
            print(f"    left out: {', '.join(dropped)}, for which {arguments.tokenizers} has no tokenizer")
        recipe.write_text(yaml.safe_dump({m: wanted[m] for m in found}, sort_keys=False))
        made = work / "tokenizers"
        steps = arguments.vocoder
        if steps is None and corpus is None and speaks_by_centroids(wanted.get("speech")):
            steps = VOCODER_STEPS
        vocoder = ["--vocoder", str(steps)] if steps and "speech" in found else []
        call("train-tokenizers", "--config", recipe, "--input", raw, "--output", made, *vocoder, threads=cores)

    with stage("3/5 token shards"):
        for part in ("train", "val"):
            tool = (
                "tokenize",
                "--config",
                made / "tokenizers.yaml",
                "--output",
                work / "tokens" / part,
            )
            call(*tool, "--input", raw, "--split", part, *(["--drop-modalities", *dropped] if dropped else []))

    name = "held_out"
    given = load_config(arguments.config)
    vocabulary = {m: dict(given.layout.sizes)[m] for m in found}
    prompts = [{"text": "A handwritten digit" if corpus is None else "The"}, *({"start": m} for m in found[1:])]
    overrides = [
        f"run_dir={work / 'run'}",
        f"tokenizers={made / 'tokenizers.yaml'}",
        f"vocabulary={json.dumps(vocabulary)}",
        f"data.train={json.dumps(sources(work / 'tokens' / 'train', given.data.lanes, SHARES))}",
        f"data.validation={json.dumps({name: sources(work / 'tokens' / 'val', 1, SHARES)})}",
        f"sampling.prompts={json.dumps(prompts)}",
        f"sampling.every={given.training.steps}",  # so: where it stops, and where it ends
        *arguments.overrides,
    ]
    config = load_config(arguments.config, overrides)
    launch = ("local", "--nproc-per-node", "2", arguments.config, *overrides)
    half = config.training.steps // 2
    with stage(f"4/5 training: {config.training.steps} steps on 2 ranks, stopped at step {half} and resumed"):
        if finished(config):
            print(f"    {config.run_dir} is finished: its {config.training.steps} steps are not trained again")
        else:
            if not (config.run_dir / "LATEST").exists():
                call(*launch, f"training.stop_at={half}")
            call(*launch)

    with stage("5/5 what came out"):
        run = config.run_dir
        if not (run / "report.html").exists() or not finished(config):
            baseline = unigram(config)
            write_baseline(run, baseline)
            call("plot", run, "--out", run / "curves.png")
            text = f"```\n{report(config, baseline[name], name)}\n```\n"
            if corpus is None and "image" in found:
                text += f"\n{captions_heeded(run)}"
            (run / "report.md").write_text(text)
            start = ["--start", "image"] if "image" in found else []
            prompt = ["--prompt", "A handwritten digit"] if corpus is None else []
            call("generate", run, *prompt, *start, "--samples", "2", "--max-tokens", "300", quiet=True)
            if len(found) > 1:
                write_round_trips(run, Tokenizers.load(made / "tokenizers.yaml"), files_of_side([str(raw)], "val")[0])
            call("report", run, quiet=True)
        print("\n" + (run / "report.md").read_text().replace("```\n", "").strip() + "\n")
        made_pictures = made / "reconstructions.png"
        for title, what in {
            "report": f"{run / 'report.html'}: open it in a browser",
            "run": f"{run} (config.yaml, metrics.jsonl, checkpoints/, report.md)",
            "curves": run / "curves.png",
            "samples": f"{run / 'samples'}: what the model writes, draws and says",
            "captions": f"{run / 'captions.png'}: what was drawn for each digit and ground"
            if (run / "captions.png").exists()
            else "",
            "pictures": f"{made_pictures}: what the image tokenizer keeps" if made_pictures.exists() else "",
            "TensorBoard": f"tensorboard --logdir {work}, then http://localhost:6006/#custom_scalars",
        }.items():
            if what:
                print(f"{title:<15}{what}")


if __name__ == "__main__":
    main()
