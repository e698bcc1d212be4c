"""Parts of `mom gpu-check` that train: the trainer against the CPU, resuming, memory and checkpoints, the miniature."""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import json
import multiprocessing
import os
import pydoc_data.topics
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mom_data.shards.format import ShardWriter, TokenSegment, write_manifest
from mom_tokenizers.errors import EXIT_PREEMPTED
from mom_tools.bench.findings import Findings
from mom_train.__main__ import main as mom_train
from mom_train.config.model import PROJECTIONS
from mom_train.config.run import RunConfig
from mom_train.cost.memory import memory as predicted_memory

SMALL = {"text": 256, "image": 64, "speech": 40}
"""Ids of the corpus that is made up here: bytes of Python's manual, pictures as codes, speech units."""
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4
"""Greatest relative difference to the CPU over all steps, in fp32."""


# ---- runs --------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, documents: int, seed: int = 0, patch_width: int | None = None) -> Path:
    """Token shards of documents that a model can learn: a piece of Python's manual, then a picture of stripes, as 64
    codes or 64 patches of latents, then a word of speech said several times."""
    folder.mkdir(parents=True)
    manual = np.frombuffer("".join(pydoc_data.topics.topics.values()).encode(), np.uint8)
    rng = np.random.default_rng(seed)
    modalities = list(SMALL)[: 3 if patch_width is None else 2]
    with ShardWriter(folder / "part-00000.tar", modalities) as writer:
        for number in range(documents):
            at = int(rng.integers(0, len(manual) - 400))
            segments = [TokenSegment(0, manual[at : at + int(rng.integers(40, 400))].astype(np.uint16))]
            stripes = (np.arange(64) * int(rng.integers(1, 8)) + int(rng.integers(0, 64))) % SMALL["image"]
            if patch_width is None:
                segments.append(TokenSegment(1, stripes.astype(np.uint16)))
                word = rng.integers(0, SMALL["speech"], int(rng.integers(4, 12)))
                segments.append(TokenSegment(2, np.tile(word, 5).astype(np.uint16)))
            else:
                waves = np.sin(stripes[:, None] / 10 + np.arange(patch_width))
                segments.append(TokenSegment(1, waves.astype(np.float16)))
            writer.add(str(number), segments)
    made_by: dict[str, Any] = {m: {"kind": "made up", "fingerprint": m, "size": SMALL[m]} for m in modalities}
    if patch_width is not None:
        made_by["image"] |= {"patch_width": patch_width, "latent_scale": 1.0, "latent_shift": 0.0, "size": 1}
    write_manifest(folder, [writer.record()], made_by, np.uint16, {})
    return folder


def config_of(run_dir: Path, corpus: Path, **sections: Any) -> RunConfig:
    """The config of a run on `corpus`; `sections` add to those of a small mixture, or replace them."""
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "vocabulary": SMALL,
        "model": {"dim": 64, "layers": 1, "decoupled": list(PROJECTIONS)},
        "data": {"train": [{"path": str(corpus)}], "sequence_length": 256, "lanes": 2, "workers": 0},
        "optimizer": {"learning_rate": 3e-3, "warmup": 1},
        "training": {"steps": 12, "batch": 4, "micro_batch": 2},
        "log_every": 1,
    }
    for key, value in sections.items():
        merge = isinstance(value, dict) and key != "vocabulary"
        values[key] = {**values.get(key, {}), **value} if merge else value
    return RunConfig.model_validate(values)


def train(config: RunConfig, *overrides: str, cpu: bool = False, tiny: bool = False) -> int:
    """Train in a process of its own, without a GPU if `cpu`. Returns its exit code; what it prints is in the log."""
    file = config.run_dir.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    # forked: this process has imported everything and has not touched the GPU
    process = multiprocessing.get_context("fork").Process(target=_train, args=(file, overrides, cpu, tiny))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _train(file: Path, overrides: Sequence[str], cpu: bool, tiny: bool) -> None:
    if cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if tiny:
        torch.set_num_threads(1)
    sys.argv = ["mom_train", str(file), *overrides]
    mom_train()


def trained(config: RunConfig, *overrides: str, **how: bool) -> list[dict[str, float]]:
    """The figures of every step of a run. Raises RuntimeError if it does not end well."""
    code = train(config, *overrides, **how)
    if code not in (0, EXIT_PREEMPTED):
        raise RuntimeError(f"the run {config.run_dir.name} ended with exit code {code}")
    return logged(config.run_dir)


def logged(run_dir: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def of_kind(line: dict[str, float], kind: str) -> dict[str, float]:
    """The losses or gradient norms ("loss", "grad_norm") among the figures of a step."""
    return {name: value for name, value in line.items() if name.split("/")[0] == kind}


def greatest_difference(a: list[dict[str, float]], b: list[dict[str, float]], kind: str) -> float:
    """The greatest relative difference of the figures of a kind over all steps of two runs; infinite if the runs do
    not have the same ones."""
    ours, theirs = ([of_kind(line, kind) for line in lines] for lines in (a, b))
    if [list(x) for x in ours] != [list(x) for x in theirs] or not any(ours):
        return float("inf")
    pairs = [(x[name], y[name]) for x, y in zip(ours, theirs, strict=True) for name in x]
    differences = [abs(x - y) / max(abs(y), 1e-30) for x, y in pairs]
    return max((d if d == d else float("inf")) for d in differences)


# ---- right -------------------------------------------------------------------------------------------------


def trainer(findings: Findings) -> None:
    """Trains the same run in fp32 on this device and on the CPU, and compares losses and gradient norms."""
    steps = 3 if findings.tiny else 20
    corpus = write_corpus(findings.scratch / "corpus", 60)
    lines = {}
    for where in ("cpu", "here"):
        config = config_of(findings.scratch / where, corpus, training={"steps": steps})
        lines[where] = trained(config, cpu=where == "cpu", tiny=findings.tiny)
    for kind, allowed in (("loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE)):
        difference = greatest_difference(lines["here"], lines["cpu"], kind)
        verdict = "equal" if difference <= allowed else "**WRONG**"
        cells = {"compared": kind, "greatest relative difference": f"{difference:.1e}", "allowed": f"{allowed:.0e}"}
        findings.row(f"{steps} steps in fp32, beside the CPU", **cells, verdict=verdict)
        if difference > allowed:
            findings.wrong(f"{kind} differs from the CPU's by {difference:.1e} of its value")
    findings.figure("lines", lines)
    if findings.device == "cpu":
        findings.note("There is no GPU: the CPU was compared with itself.")


def resume(findings: Findings) -> None:
    """Trains a run in bf16 with a checkpoint every few steps, then again with a stop in between, and compares every
    loss, every norm and every tensor of the last checkpoint bit by bit."""
    every, steps = (1, 3) if findings.tiny else (4, 12)
    stop = steps - every
    corpus = write_corpus(findings.scratch / "corpus", 60)
    changes = {"training": {"steps": steps, "precision": "bf16"}, "checkpoint": {"every": every, "keep": 9}}
    whole = config_of(findings.scratch / "whole", corpus, **changes)
    halves = config_of(findings.scratch / "halves", corpus, **changes)
    lines = trained(whole, tiny=findings.tiny)
    saved = sorted(p.name for p in (whole.run_dir / "checkpoints").glob("step-*"))
    findings.row("Resuming", what="checkpoints of one process", found=f"{len(saved)}: {', '.join(saved)}")
    if len(saved) != steps // every:
        findings.wrong(f"one process wrote the checkpoints {saved}, not {steps // every}")
    trained(halves, f"training.stop_at={stop}", tiny=findings.tiny)
    again = trained(halves, tiny=findings.tiny)
    for kind in ("loss", "grad_norm"):
        same = [of_kind(x, kind) for x in lines] == [of_kind(x, kind) for x in again]
        _compared(findings, f"{kind} of {steps} steps, stopped after {stop}", same)
    a, b = (tensors_of(config.run_dir) for config in (whole, halves))
    same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    _compared(findings, f"{len(a)} tensors of the last checkpoint", same)


def _compared(findings: Findings, what: str, same: bool) -> None:
    findings.row("Resuming", what=what, found="equal to the last bit" if same else "**WRONG: they differ**")
    if not same:
        findings.wrong(f"{what} differ from those of the run that was left alone")


def tensors_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint by name, by PyTorch's own converter."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    file = run_dir / "whole.pt"
    dcp_to_torch_save(run_dir / "checkpoints" / (run_dir / "LATEST").read_text().strip(), file)
    found: dict[str, torch.Tensor] = {}

    def gather(prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                gather(f"{prefix}{name}.", value)
            elif isinstance(value, torch.Tensor):
                found[prefix + name] = value

    gather("", torch.load(file, map_location="cpu", weights_only=True))
    return found


# ---- memory and checkpoints --------------------------------------------------------------------------------

PRESETS = {"37M": (256, 4), "443M": (1024, 24)}
"""Name of a model of the paper -> width and layers."""


def memory(findings: Findings) -> None:
    """Trains presets for a few steps with a checkpoint at each, and compares the peak of memory with the prediction."""
    corpus = write_corpus(findings.scratch / "corpus", 20 if findings.tiny else 2000)
    presets = {"tiny": (32, 1)} if findings.tiny else PRESETS
    for name, (dim, layers) in presets.items():
        if not findings.time_for(f"memory of the mixture at {name}", 0 if findings.tiny else 18):
            continue
        config = config_of(
            findings.scratch / name,
            corpus,
            vocabulary=SMALL if findings.tiny else {"text": 56836, "image": 8192, "speech": 500},
            model={"dim": dim, "layers": layers},
            data={"sequence_length": 64 if findings.tiny else 4096},
            training={"steps": 4, "batch": 2, "micro_batch": 2, "precision": "bf16"},
            checkpoint={"every": 1, "keep": 1},
        )
        peak_file = findings.scratch / f"{name}.peak"
        process = multiprocessing.get_context("fork").Process(target=_peak, args=(config, peak_file, findings.tiny))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the run at {name} ended with exit code {process.exitcode}")
        seen = json.loads(peak_file.read_text())
        predicted = predicted_memory(config, 1, "cuda" if findings.device == "cuda" else "cpu")
        total = predicted[predicted["chosen"]]["total"]
        measured = seen["peak"]
        cells = {
            "mixture of 3": name,
            "predicted GB": f"{total / 1e9:.4g}",
            "measured GB": f"{measured / 1e9:.4g}" if measured else "not measured (no GPU)",
            "measured / predicted": f"{measured / total:.3f}" if measured else "",
        }
        findings.row("Peak of memory of a training step", **cells)
        lines = logged(config.run_dir)[1:]  # the figure of a step is the stall of the save before it
        stall = statistics.median(line["checkpoint/stall_s"] for line in lines)
        size = sum(f.stat().st_size for f in (config.run_dir / "checkpoints").rglob("*") if f.is_file())
        cells = {"checkpoint MB": f"{size / 1e6:.4g}", "stop s": f"{stall:.4f}"}
        findings.row("How long a checkpoint stops training (median)", **{"mixture of 3": name}, **cells)
        findings.figure(name, {"predicted": predicted, "peak": measured, "stalls": stall, "bytes": size})


def _peak(config: RunConfig, file: Path, tiny: bool) -> None:
    """Train, and write the most bytes that PyTorch's allocator had in use on the GPU."""
    if tiny:
        torch.set_num_threads(1)
    from mom_train.trainer import train as run

    code = run(config)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    file.write_text(json.dumps({"peak": peak}))
    sys.exit(code)


# ---- the miniature -----------------------------------------------------------------------------------------


def miniature(findings: Findings) -> None:
    """Trains the mixture of 37M on made-up documents for a minute."""
    seconds = min(60.0, findings.seconds_left() - 12)
    if not findings.time_for("training at 37M", 22):
        return
    dim, layers = (32, 1) if findings.tiny else PRESETS["37M"]
    length, batch = (64, 2) if findings.tiny else (4096, 16)
    config = config_of(
        findings.scratch / "miniature",
        write_corpus(findings.scratch / "corpus", 20 if findings.tiny else 20_000),
        vocabulary=SMALL if findings.tiny else {"text": 56836, "image": 8192, "speech": 500},
        model={"dim": dim, "layers": layers},
        data={"sequence_length": length},
        training={"steps": 3 if findings.tiny else 2000, "batch": batch, "micro_batch": batch, "precision": "bf16",
                  "time_limit": seconds},
        log_every=1 if findings.tiny else 10,
    )  # fmt: skip
    lines = trained(config, tiny=findings.tiny)
    for number in sorted({0, len(lines) // 2, len(lines) - 1}):
        line = lines[number]
        losses = {name.removeprefix("loss/"): f"{value:.3f}" for name, value in of_kind(line, "loss").items()}
        cells = {"step": str(line["step"]), **losses, "tokens/s": f"{line['perf/tokens_per_s']:,.0f}"}
        findings.row("Losses in nats per token, and speed, of the mixture of 3", **cells)
    findings.figure("lines", lines)
