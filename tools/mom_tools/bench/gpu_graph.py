"""The part of `mom gpu-check` about `training.cuda_graph`: the bits and the time of passes that are replayed."""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import gc
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mom_data.batches.batch import PackedBatch, sort_by_modality
from mom_tools.bench.findings import Findings
from mom_tools.bench.gpu_runs import config_of
from mom_tools.bench.step import draw_on_device
from mom_train.config.model import PROJECTIONS
from mom_train.config.run import RunConfig
from mom_train.distributed.ranks import Ranks
from mom_train.model.init import initialize
from mom_train.model.language_model import build_model
from mom_train.model.objective import Counts
from mom_train.passes import Passes


class Case(NamedTuple):
    """A model and a micro-batch."""

    name: str
    dim: int
    layers: int
    batch: int
    length: int
    modalities: int
    """1 for a dense model."""
    checkpointing: Any = False
    compiled: bool = False
    seconds: float = 6
    """About how long it takes on an H100."""


CASES = (
    Case("dense, 37M", 256, 4, 8, 4096, 1),
    Case("mixture, M = 2, 37M", 256, 4, 8, 4096, 2),
    Case("dense, 1.5B", 2048, 24, 2, 4096, 1, "selective", seconds=10),
    Case("mixture, M = 2, 1.5B", 2048, 24, 2, 4096, 2, "selective", seconds=10),
    Case("mixture, M = 3, 37M, compiled", 256, 4, 8, 4096, 3, compiled=True, seconds=15),
)
"""On a GPU, in the order of their worth."""
TINY_CASES = (Case("dense, tiny", 32, 1, 2, 64, 1), Case("mixture, M = 3, tiny", 32, 1, 2, 64, 3))


class Compared(NamedTuple):
    """What came of passes without a graph and with one."""

    different: list[str]
    """Names of the gradients and sums that are not the same bits."""
    without_ms: float
    """Median by the clock, for the forward and backward pass of one micro-batch."""
    with_ms: float
    tokens: int


def compared(device: torch.device, case: Case, precision: str = "bf16", repetitions: int = 7) -> Compared:
    """Runs the passes of three micro-batches of different spans, of which the last two make one step, by PyTorch one
    operation after the other, with autocast, and by `StepGraph`. Then times both in turns."""
    passes = _passes(device, case, precision)
    batches = [_batch(passes.config, case, seed) for seed in range(3)]
    positions = case.batch * case.length
    counts = Counts(torch.tensor([b.labels.ge(0).sum() for b in batches]), 0, positions)
    parameters = dict(passes.model.named_parameters())
    graph, objective = passes._graph, passes.config.objective
    assert graph is not None

    def without(batch: PackedBatch, first: bool) -> Tensor:
        if first:
            passes.model.zero_grad()
        scored = passes.score(batch, 0)
        counts.objective(scored.losses, objective).backward()
        return scored.sums

    def replayed(batch: PackedBatch, first: bool) -> Tensor:
        return graph(batch, counts, objective, first)

    def results(run: Callable[[PackedBatch, bool], Tensor]) -> dict[str, int]:
        found = {}
        passes.model.zero_grad()
        for number, (batch, first) in enumerate(zip(batches, (True, True, False), strict=True)):
            found[f"loss sums of micro-batch {number}"] = digest(run(batch, first))
            if number != 1:
                of_this = {f"{name}, micro-batch {number}": p.grad for name, p in parameters.items()}
                found |= {name: digest(g) for name, g in of_this.items() if g is not None}
        return found

    ours, wanted = results(replayed), results(without)
    different = [name for name in wanted if ours.get(name) != wanted[name]]
    times: dict[Callable[..., Tensor], list[float]] = {without: [], replayed: []}
    for _ in range(repetitions):
        for run, taken in times.items():
            passes.model.zero_grad()
            _wait(device)
            begun = time.perf_counter()
            run(batches[0], True)
            _wait(device)
            taken.append(1e3 * (time.perf_counter() - begun))
    return Compared(different, statistics.median(times[without]), statistics.median(times[replayed]), positions)


def digest(t: Tensor) -> int:
    """A number that depends on every bit of a tensor and on its place: gradients of billions of weights need not be
    kept to be compared. The signs of zeros are left out."""
    bits = (t.detach() + 0.0).reshape(-1).view(torch.int64 if t.dtype == torch.float64 else torch.int32).long()
    return int((bits * torch.arange(1, 2 * len(bits), 2, device=t.device)).sum())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _passes(device: torch.device, case: Case, precision: str) -> Passes:
    small = case.dim < 256
    config = config_of(
        Path("unused"),
        Path("unused"),
        vocabulary={"text": 256 if small else 65_000, **({"image": 64, "speech": 40} if case.modalities > 1 else {})},
        model={"dim": case.dim, "layers": case.layers, "decoupled": list(PROJECTIONS) if case.modalities > 1 else []},
        data={"sequence_length": case.length},
        training={"batch": 2 * case.batch, "micro_batch": case.batch, "precision": precision, "cuda_graph": True,
                  "activation_checkpointing": case.checkpointing},
    )  # fmt: skip
    if case.modalities == 2:
        vocabulary = {name: size for name, size in dict(config.layout.sizes).items() if name != "speech"}
        config = RunConfig.model_validate({**config.model_dump(), "vocabulary": vocabulary})
    model = build_model(config)
    model.to_empty(device=device)
    if device.type == "cuda":
        draw_on_device(model)
    else:
        initialize(model, 0)
    for block in model.blocks if case.compiled else ():
        block.compile()
    return Passes(config, config.layout, Ranks(0, 1, device, None), model)  # type: ignore[arg-type]  # no mesh


def _batch(config: RunConfig, case: Case, seed: int) -> PackedBatch:
    """Rows of spans of other lengths for each seed; with seed 1, the last modality has none."""
    g = torch.Generator().manual_seed(seed)
    B, L, M = case.batch, case.length, len(config.layout.modalities)
    used = max(1, M - 1) if seed == 1 else M
    spans = torch.randint(5, 120, (B * L // 5 + 1,), generator=g)
    number_T = torch.arange(len(spans)).repeat_interleave(spans)[: B * L].view(B, L)
    modality = (number_T % used).to(torch.uint8)
    tokens, labels = torch.randint(0, config.layout.size, (2, B, L), generator=g)
    labels[:, ::7] = -100
    order, rows, offsets = sort_by_modality(modality, M)
    none = torch.zeros(0, dtype=torch.int64)
    batch = PackedBatch(
        tokens=tokens, modality=modality, document=(number_T // 4).to(torch.int32), labels=labels,
        latents=torch.zeros(0, 0, dtype=torch.float16), latent_position=none, image_of_patch=none.int(),
        image_leads=none.bool(), sequences=torch.arange(B), order=order, rows=rows, offsets=offsets,
        real_tokens=offsets.diff(),
    )  # fmt: skip
    return batch.pin_memory() if torch.cuda.is_available() else replace(batch)


def graph(findings: Findings) -> None:
    """Compares bits and time of the passes with and without graphs, for dense models and mixtures."""
    device = torch.device(findings.device)
    if findings.tiny:
        torch.set_num_threads(1)
    if device.type == "cpu":
        findings.note("There is no GPU: nothing was recorded, and the same passes ran in the tensors of a recording.")
    dense: dict[str, float] = {}  # size -> ms with a graph
    for case in TINY_CASES if findings.tiny else CASES:
        if not findings.time_for(case.name, 0 if findings.tiny else case.seconds):
            continue
        try:
            found = compared(device, case, repetitions=1 if findings.tiny else 7)
        except Exception as raised:
            traceback.print_exc()
            findings.wrong(f"{case.name}: {type(raised).__name__}: {str(raised)[:200]}")
            continue
        finally:
            gc.collect()
            torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        size = case.name.split(", ")[-1]
        if case.modalities == 1:
            dense[size] = found.with_ms
        findings.row(
            "Forward and backward pass of a micro-batch, bf16, ms by the clock",
            **{
                "model": case.name,
                "tokens": f"{found.tokens:,}",
                "without a graph": f"{found.without_ms:.2f}",
                "with": f"{found.with_ms:.2f}",
                "to dense, with": f"{found.with_ms / dense[size]:.3f}" if size in dense else "",
                "bits": "equal" if not found.different else f"**{len(found.different)} tensors differ**",
            },
        )
        findings.figure(case.name, found._asdict())
        if found.different and not case.compiled:  # the compiler may fuse other operations without casts of weights
            findings.wrong(f"{case.name}: with a graph other bits are in {', '.join(found.different[:3])}")
