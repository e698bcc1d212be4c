"""Show that two checkouts compute the same bits: the same small jobs with the code of each, compared.

    python tools/dev/same_bits.py OLD NEW     # two folders, such as git worktrees; five minutes on two cores

Each side has a folder of its own, in which the same commands run with PYTHONPATH set to the packages of its checkout.
The jobs run on the CPU, one thread for each process, both sides at once. Compared are files by SHA-256, the values of
metrics.jsonl and train_state.json, and every tensor of every checkpoint. Left out are clock times and speeds, and the
name of the module that an export for Transformers imports. Exit code 1 where anything differs or a command fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate
from tqdm import tqdm

ROOTS = (".", "data", "tokenizers", "tools")
CLOCKS = ("perf/", "checkpoint/", "seconds")
"""Beginnings of the keys, in metrics.jsonl and in the tokenizers' training.json, that hold clock times and speeds."""

DISCRETE = """
text: {size: 512, max_documents: 200}
image: {size: 64, resolution: 32, block_out_channels: [8, 16, 32], latent_channels: 8, max_images: 80, batch_size: 8,
        learning_rate: 0.004, autoencoder_steps: 8, quantized_steps: 8}
speech: {size: 32, extractor: log_mel, max_seconds: 100}
"""
LATENT = """
text: {size: 512, max_documents: 200}
image: {kind: kl, resolution: 32, block_out_channels: [8, 16, 32], latent_channels: 4, patch: 2, max_images: 80,
        batch_size: 8, learning_rate: 0.004, kl_weight: 0.001, steps: 8}
"""
PICTURES = """
text: {kind: bpe, path: discrete/text}
image: {kind: vq, path: discrete/image}
"""
RUN = """
base: configs/{base}.yaml
run_dir: runs/{name}
tokenizers: {tokenizers}
model: {{dim: 64, layers: 2}}
data:
  train: [{{path: tokens/{name}, shards: "train-0000[0-2]*"}}]
  validation: {{{held_out}: [{{path: tokens/{name}, shards: "train-00003*"}}]}}
  sequence_length: 256
  lanes: 4
  workers: 0
optimizer: {{learning_rate: 1.0e-3, warmup: 2}}
training: {{steps: 6, batch: 4, micro_batch: 2}}
validation: {{every: 3, sequences: 4}}
checkpoint: {{every: 3}}
log_every: 1
"""
RUNS = {  # name of the run and of its tokens -> base, name of its validation set, tokenizers, vocabulary
    "chameleon": ("chameleon/37m-mom", "held_out", "pictures.yaml", "{text: 512, image: 64}"),
    "speech": (
        "chameleon_speech/37m-mom",
        "held_out",
        "discrete/tokenizers.yaml",
        "{text: 512, image: 64, speech: 32}",
    ),
    "transfusion": ("demo_transfusion", "demo", "latent/tokenizers.yaml", "{text: 512, image: 1}"),
}
INPUTS = {"discrete.yaml": DISCRETE, "latent.yaml": LATENT, "pictures.yaml": PICTURES} | {
    f"{name}.yaml": RUN.format(name=name, base=base, held_out=held_out, tokenizers=tokenizers)
    + f"vocabulary: {vocabulary}\n"
    for name, (base, held_out, tokenizers, vocabulary) in RUNS.items()
}
JOBS = """
# corpus: raw/**/*
python tools/make_demo_corpus.py --output raw --documents 160 --workers 1
# tokenizers of codes, units and latents: discrete/**/* latent/**/*
python tools/train_tokenizers.py --config discrete.yaml --input raw/train --output discrete
python tools/train_tokenizers.py --config latent.yaml --input raw/train --output latent
# token shards: tokens/*/*
python tools/tokenize_shards.py --config pictures.yaml --input raw/train --output tokens/chameleon \
    --workers 1 --drop-modalities speech
python tools/tokenize_shards.py --config discrete/tokenizers.yaml --input raw/train --output tokens/speech --workers 1
python tools/tokenize_shards.py --config latent/tokenizers.yaml --input raw/train --output tokens/transfusion \
    --workers 1 --drop-modalities speech
# Chameleon, 1 rank: runs/chameleon
python -m mom_train chameleon.yaml
# Chameleon + Speech, 2 ranks: runs/speech
python -m torchrun_launch local --nproc-per-node 2 speech.yaml
# Transfusion, 1 rank: runs/transfusion
python -m mom_train transfusion.yaml
# Transfusion, 2 ranks: runs/transfusion-2
python -m torchrun_launch local --nproc-per-node 2 transfusion.yaml run_dir=runs/transfusion-2
# dense Mamba: runs/mamba
python -m mom_train chameleon.yaml run_dir=runs/mamba model.decoupled=[]
# Transformer: runs/transformer
python -m mom_train chameleon.yaml run_dir=runs/transformer model.architecture=transformer model.heads=4 \
    model.decoupled=[]
# stopped at step 3 of 6: runs/halves
python -m mom_train chameleon.yaml run_dir=runs/halves training.stop_at=3
# the same, resumed: runs/halves
python -m mom_train chameleon.yaml run_dir=runs/halves
# export: exported/**/*
python tools/checkpoint.py runs/speech export --out exported/checkpoint
python tools/export_model.py runs/transfusion --out exported/safetensors
python tools/export_model.py runs/mamba --out exported/mamba --format transformers
python tools/export_model.py runs/chameleon --out exported/transformers --format transformers
# samples: samples/**/*
python tools/generate.py runs/speech --prompt 'The digit' --seed 1 --max-tokens 96 --out samples/speech
python tools/generate.py runs/transfusion --prompt 'The digit' --start image --seed 1 --max-tokens 96 \
    --denoising-steps 5 --out samples/transfusion
"""
"""A line `# job: globs of what it leaves` before the commands of each; a folder with a metrics.jsonl is a run."""
STOPPED, RESUME = "stopped at step 3 of 6", "python -m mom_train chameleon.yaml run_dir=runs/halves"

_CONFIG = "config"
Value = tuple[str, int]
"""A value of a JSON and 0, or the SHA-256 of bytes and their number."""
Contents = dict[str, Value]
Row = tuple[str, int, int, str]
"""Job, number of values, tensors and files, the bytes of tensors and files, and `equal` or the first difference."""


@dataclass(frozen=True)
class Side:
    """One of the two checkouts, and a folder in which its code works."""

    folder: Path
    checkout: Path
    python: str

    def prepare(self) -> None:
        self.folder.mkdir(parents=True)
        for name in ("tools", "configs"):
            (self.folder / name).symlink_to(self.checkout / name)
        for name, text in INPUTS.items():
            (self.folder / name).write_text(text)

    def run(self, command: str) -> str:
        """Run a command. Returns its standard output. Raises RuntimeError where it fails."""
        path = os.pathsep.join(str(self.checkout / root) for root in ROOTS)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        given = [self.python, *shlex.split(command)[1:]]
        done = subprocess.run(given, cwd=self.folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.checkout}: {command}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        return done.stdout

    def check_imports(self) -> str:
        """Check that the packages of this checkout are the ones that are imported. Returns what the checkout is."""
        packages = {file.parent.name for root in ROOTS for file in self.checkout.glob(f"{root}/mom_*/__init__.py")}
        names = sorted({*packages, "torchrun_launch"})
        look = f"import {', '.join(names)}; print({', '.join(f'{name}.__file__' for name in names)}, sep=chr(10))"
        found = self.run(f"python -c {shlex.quote(look)}").splitlines()
        for file in found:
            if not Path(file).resolve().is_relative_to(self.checkout):
                raise RuntimeError(f"{file} would be compared in place of the code in {self.checkout}")
        git = ["git", "-C", str(self.checkout)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        edited = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
        return f"commit {commit}{' and edits' if edited else ''}: {', '.join(found)}"

    def contents(self, paths: str) -> Contents:
        """Everything that a job left."""
        found: Contents = {}
        for path in sorted(match for pattern in paths.split() for match in self.folder.glob(pattern)):
            name = str(path.relative_to(self.folder))
            if (path / "metrics.jsonl").is_file():
                found |= {f"{name}: {what}": value for what, value in of_run(path)}
            elif path.name == "training.json":  # of a tokenizer: it also holds how long the training took
                found |= {f"{name}: {what}": value for what, value in of_json(json.loads(path.read_text()))}
            elif path.name.startswith("modeling_"):  # one line of code, which imports the model from where it is now
                text = re.sub(r"from mom_train[.\w]* import", "from mom_train import", path.read_text())
                found[f"{name}, but for the name of the module"] = of_bytes(text.encode())
            elif path.name == "config.yaml":
                found |= {
                    f"{name}: {what}": value for what, value in of_json(yaml.safe_load(path.read_text()), _CONFIG)
                }
            elif path.is_file() and path.suffix != ".lock":
                found[name] = of_bytes(path.read_bytes())
        return found


def of_bytes(content: bytes) -> Value:
    return hashlib.sha256(content).hexdigest(), len(content)


def of_json(values: Any, name: str = "") -> Iterator[tuple[str, Value]]:
    """Every number, text and truth value inside. Floats have the digits that tell them from all other floats."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            if not key.startswith(CLOCKS):
                yield from of_json(value, f"{name} {key}")
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from of_json(value, f"{name} {index}")
    else:
        yield name.strip(), (repr(values), 0)


def of_run(run: Path) -> Iterator[tuple[str, Value]]:
    """The metrics of every step, and the tensors and the state of every checkpoint."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    for number, line in enumerate((run / "metrics.jsonl").read_text().splitlines(), 1):
        yield from of_json(json.loads(line), f"metrics, line {number}")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    for folder in sorted(run.glob("checkpoints/step-*")):
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        tensors = {}
        for name, kind in stored.items():
            assert isinstance(kind, TensorStorageMetadata), f"{folder}: {name} is no tensor"
            tensors[name] = torch.zeros(kind.size, dtype=kind.properties.dtype)
        load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
        for name, tensor in tensors.items():
            digest, size = of_bytes(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            yield f"{folder.name} {name}", (f"{tensor.dtype} {tuple(tensor.shape)} {digest}", size)
        yield from of_json(json.loads((folder / "train_state.json").read_text()), f"{folder.name} state")


def row(name: str, old: Contents, new: Contents) -> Row:
    """One row of the table. Keys of a config that only NEW knows are left out: the jobs set none of them, so that they
    have their defaults, which a run must not notice."""
    added = [key for key in new if key not in old and f" {_CONFIG} " in key]
    new = {key: value for key, value in new.items() if key not in set(added)}
    first = next((key for key in old | new if old.get(key) != new.get(key)), None)
    result = "equal" if old else "there is nothing to compare"
    if old and added:
        result += f"; {len(added)} keys of the config are new"
    if first is not None:
        was, now = (side.get(first, ("not there", 0))[0] for side in (old, new))
        result = f"{first}: {was} -> {now}"
    return name, len(old), sum(size for _, size in old.values()), result


def compare(old: Side, new: Side, both: Callable[..., list[Any]]) -> list[Row]:
    crossed = Side(new.folder.with_name("old-then-new"), new.checkout, new.python)
    rows: list[Row] = []
    with tqdm(total=JOBS.count("\npython") + 1, unit="command", smoothing=0) as steps:

        def run(command: str, work: Callable[[str], Any]) -> None:
            steps.set_postfix_str(command[:60])
            work(command)
            steps.update()

        for job in JOBS.strip().removeprefix("# ").split("\n# "):
            (name, _, paths), *commands = job.split("\n")[0].partition(": "), *job.split("\n")[1:]
            for command in commands:
                run(command, lambda command: both(Side.run, command))
            rows.append(row(name, *both(Side.contents, paths)))
            if name == STOPPED:
                crossed.prepare()
                for kept in ("tokens", "discrete"):
                    (crossed.folder / kept).symlink_to(new.folder / kept)
                shutil.copytree(old.folder / "runs/halves", crossed.folder / "runs/halves")
        run(RESUME, crossed.run)
    halves, whole = new.contents("runs/halves"), new.contents("runs/chameleon")
    rows.append(row("NEW resumed what OLD had begun, and what NEW had", crossed.contents("runs/halves"), halves))
    # a state holds its run's config, in which run_dir and stop_at do differ
    whole, halves = (
        {key.partition(": ")[2]: value for key, value in run.items() if " state config " not in key}
        for run in (whole, halves)
    )
    rows.append(row("NEW: a run that never stopped, and one resumed", whole, halves))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="checkout")
    parser.add_argument("new", type=Path, help="checkout")
    parser.add_argument("--old-python", default=sys.executable, help="interpreter for OLD (this one)")
    parser.add_argument("--new-python", default=sys.executable, help="interpreter for NEW (this one)")
    parser.add_argument("--work", type=Path, help="folder that keeps what the jobs write (a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as pool:
        work = (arguments.work or Path(temporary, "bits")).absolute()
        old = Side(work / "old", arguments.old.resolve(), arguments.old_python)
        new = Side(work / "new", arguments.new.resolve(), arguments.new_python)

        def both(action: Callable[..., Any], *values: str) -> list[Any]:
            return list(pool.map(lambda side: action(side, *values), (old, new)))

        try:
            both(Side.prepare)
            print("OLD: {}\nNEW: {}".format(*both(Side.check_imports)))
            rows = compare(old, new, both)
        except (RuntimeError, FileExistsError) as error:
            sys.exit(f"same_bits: {error}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    headers = ("job", "values, tensors, files", "bytes", "OLD and NEW")
    print(tabulate(rows, headers, tablefmt="github", intfmt=",", disable_numparse=[3]))
    sys.exit(any(not result.startswith("equal") for *_, result in rows))


if __name__ == "__main__":
    main()
