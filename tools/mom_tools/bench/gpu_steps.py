"""Parts of `mom gpu-check` about whole models: the training step, Transfusion, generation and tokenizers."""

from __future__ import annotations

import mom_tokenizers  # noqa: F401  # isort: skip  # before torch: how its threads wait

import argparse
import gc
import importlib.util
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from mom_tokenizers.vocab import VocabLayout
from mom_tools.bench import step as bench_step
from mom_tools.bench.findings import PROFILE, Findings
from mom_tools.bench.gpu_runs import config_of, of_kind, trained, write_corpus
from mom_train.config.model import PROJECTIONS, DiffusionConfig, ModelConfig
from mom_train.generate.sampler import Sampler, Sampling
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel

# ---- the training step -------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Systems that take turns in one run of `mom bench step`."""

    preset: str
    compiled: bool
    modalities: int
    systems: tuple[str, ...]
    seconds: float
    """About how long it takes on an H100."""
    precision: str = "bf16"
    """On a CPU it is always fp32, because bf16 is slow on one without AMX."""


class Preset(NamedTuple):
    """The size of a model of the paper and the batch it is timed with."""

    dim: int
    layers: int
    heads: int
    batch: int
    length: int
    vocabulary: int
    checkpointing: str


PRESETS = {
    "1.5B": Preset(2048, 24, 16, 4, 4096, 65_536, "selective"),
    "37M": Preset(256, 4, 8, 8, 4096, 65_536, "false"),
    "tiny": Preset(32, 1, 2, 1, 64, 128, "false"),
}
_PAIR = ("dense", "mixture")
CASES = (
    Case("1.5B", True, 2, ("dense",), 25),
    Case("1.5B", True, 2, ("mixture",), 25),
    Case("37M", True, 3, _PAIR, 15),
    Case("1.5B", True, 2, ("dense",), 25, "fp8"),
    Case("1.5B", True, 2, ("mixture",), 25, "fp8"),
    Case("1.5B", True, 3, ("mixture",), 25),
    Case("37M", False, 3, _PAIR, 10),
    Case("1.5B", False, 2, ("dense",), 15),
    Case("1.5B", False, 2, ("mixture",), 15),
    Case("37M", True, 2, ("dense", "mixture", "transformer", "mot"), 20),
    Case("1.5B", True, 2, ("transformer",), 25),
    Case("1.5B", True, 2, ("mot",), 25),
    Case("1.5B", False, 3, ("mixture",), 15),
    Case("37M", False, 2, ("dense", "mixture", "transformer", "mot"), 12),
    Case("1.5B", False, 2, ("transformer",), 15),
    Case("1.5B", False, 2, ("mot",), 15),
)
"""On a GPU, in the order of their worth."""
TINY_CASES = (Case("tiny", False, 2, ("dense", "mixture", "transformer", "mot"), 0),)
TOP_KERNELS = 12


def steps(findings: Findings) -> None:
    """Times the training step of each system and says which kernels take it."""
    dense: dict[tuple[str, bool, int, str], float] = {}  # preset, compiled, tokens, precision -> ms
    if findings.tiny:
        torch.set_num_threads(1)
    for case in TINY_CASES if findings.tiny else CASES:
        what = f"{' and '.join(case.systems)} at {case.preset}, {_mode(case)}, M = {case.modalities}"
        what += ", fp8" if case.precision == "fp8" else ""
        if not findings.time_for(what, case.seconds):
            continue
        try:
            result, tokens = _timed(findings, case, what)
        except Exception as raised:
            traceback.print_exc()
            findings.wrong(f"{what}: {type(raised).__name__}: {str(raised)[:200]}")
            continue
        findings.figure(what, result)
        for name, values in result["systems"].items():
            same = (case.preset, case.compiled, tokens, case.precision)
            if name == "dense":
                dense[same] = values["step_ms"]
            _rows(findings, case, name, values, tokens, dense.get(same))


def _mode(case: Case) -> str:
    return "compiled" if case.compiled else "eager"


def _precision(findings: Findings, case: Case) -> str:
    return "fp32" if findings.device == "cpu" else case.precision


def _timed(findings: Findings, case: Case, what: str) -> tuple[dict[str, Any], int]:
    """Figures of `mom bench step` and the tokens of a step. Where memory does not suffice, half the batch is tried."""
    preset = PRESETS[case.preset]
    batch = preset.batch
    while True:
        parser = argparse.ArgumentParser()
        bench_step.add_arguments(parser)
        arguments = parser.parse_args([])
        vars(arguments).update(
            systems=list(case.systems), modalities=case.modalities, compile=case.compiled, batch=batch,
            device=findings.device, precision=_precision(findings, case), profile=True,
            warm_up=1 if findings.tiny else 3,
            repetitions=1 if findings.tiny else 5, **{k: v for k, v in preset._asdict().items() if k != "batch"},
        )  # fmt: skip
        try:
            return bench_step.run(arguments), batch * preset.length
        except torch.OutOfMemoryError:
            findings.note(f"{what}: out of memory with {batch} rows of {preset.length}.")
            if batch == 1:
                raise
            batch //= 2
        finally:
            gc.collect()
            torch._dynamo.reset()  # or later sizes would be taken for more variants of the first
            if findings.device == "cuda":
                torch.cuda.empty_cache()


def _rows(
    findings: Findings, case: Case, name: str, values: dict[str, Any], tokens: int, dense_ms: float | None
) -> None:
    ratio = values.get("over_dense") or (values["step_ms"] / dense_ms if dense_ms else None)
    shown = name if name in ("dense", "transformer") else f"{name}, M = {case.modalities}"
    findings.row(
        f"Step at {case.preset}, {_precision(findings, case)}",
        **{
            "system": f"{shown}, {_mode(case)}",
            "tokens a step": f"{tokens:,}",
            "step ms": f"{values['step_ms']:.1f}",
            "kernels' ms": f"{values['device_ms']:.1f}",
            "to dense": f"{ratio:.3f}" if ratio else "",
            "tokens/s": f"{values['tokens_per_s']:,.0f}",
            "of the GEMM rate": f"{values['share_of_gemm_rate']:.3f}",
            "peak GB over the states": f"{values['peak_bytes'] / 1e9:.2f}",
        },
    )
    for kernel in values["kernels"][:TOP_KERNELS]:
        findings.row(
            f"{PROFILE}: {shown}, {case.preset}, {_mode(case)}, {_precision(findings, case)}",
            kernel=kernel["name"][:90].replace("|", "/"),
            calls=str(kernel["calls"]),
            ms=f"{kernel['ms']:.2f}",
            share=f"{100 * kernel['ms'] / max(values['device_ms'], 1e-9):.1f} %",
        )


# ---- Transfusion, generation, tokenizers -------------------------------------------------------------------


_MORE = "Transfusion, generation, tokenizers"


def transfusion(findings: Findings) -> None:
    """Trains a Transfusion model for a few steps, samples from models, and encodes pictures, all on the device. Each is
    tried even if another fails."""
    if findings.tiny:
        torch.set_num_threads(1)
    # training comes first: it is forked, and this process must not have touched the GPU by then
    for name, run in (("Transfusion", _transfusion_step), ("generation", _generation), ("tokenizers", _tokenizers)):
        try:
            run(findings)
        except Exception as raised:
            traceback.print_exc()
            findings.wrong(f"{name}: {type(raised).__name__}: {str(raised)[:200]}")


def _transfusion_step(findings: Findings) -> None:
    dim, layers, length, batch, width = (32, 1, 128, 2, 4) if findings.tiny else (768, 16, 4096, 4, 32)
    config = config_of(
        findings.scratch / "transfusion",
        write_corpus(findings.scratch / "latents", 20 if findings.tiny else 1000, patch_width=width),
        vocabulary={"text": 256 if findings.tiny else 31_991, "image": 1},
        model={"dim": dim, "layers": layers},
        objective={"diffusion": {"patch_width": width}},
        data={"sequence_length": length},
        training={"steps": 2 if findings.tiny else 8, "batch": batch, "micro_batch": batch, "precision": "bf16"},
    )
    lines = trained(config, tiny=findings.tiny)
    rate = statistics.median(line["perf/tokens_per_s"] for line in lines[len(lines) // 2 :])
    losses = of_kind(lines[-1], "loss")
    if not all(np.isfinite(list(losses.values()))):
        findings.wrong(f"Transfusion: losses are {losses}")
    found = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
    what = f"Transfusion's training, d = {dim}, {layers} layers"
    findings.row(_MORE, what=what, figure=f"{rate:,.0f} tokens/s", found=found)


def _generation(findings: Findings) -> None:
    dim, layers, tokens = (32, 1, 8) if findings.tiny else (256, 4, 256)
    vocab = VocabLayout({"text": 256, "image": 64, "speech": 40})
    config = ModelConfig(dim=dim, layers=layers, decoupled=PROJECTIONS)
    sampling = Sampling(patches_per_picture=tokens, denoising_steps=2 if findings.tiny else 50)
    for diffusion in (None, DiffusionConfig.model_validate({"patch_width": 4})):
        model = LanguageModel(config, vocab.size, 3, diffusion=diffusion).eval()
        initialize(model, 0)
        sampler = Sampler(model.to(findings.device), vocab, sampling, 0)
        sampler.read([vocab.specials["bos"], vocab.brackets("image")[0]])
        write = (lambda s=sampler: s.codes("image")) if diffusion is None else sampler.picture
        written, seconds = _clocked(findings, write)
        if diffusion is None:
            right = len(written) == tokens and all(0 <= code < 64 for code in written)
            what, figure = f"generation of {tokens} codes, d = {dim}", f"{tokens / seconds:,.1f} tokens/s"
        else:
            right = bool(written.isfinite().all())
            what = f"generation of a picture of {tokens} latent patches, d = {dim}"
            figure = f"{1e3 * seconds / sampling.denoising_steps:,.1f} ms a denoising step"
        found = "well formed" if right else "**WRONG**"
        findings.row(_MORE, what=what, figure=figure, found=found)
        if not right:
            findings.wrong(f"{what}: what was written is not well formed")


def _clocked(findings: Findings, run: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the seconds by the clock until the device is done."""
    begun = time.perf_counter()
    result = run()
    if findings.device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - begun


def _tokenizers(findings: Findings) -> None:
    if absent := [name for name in ("diffusers", "PIL") if importlib.util.find_spec(name) is None]:
        findings.left_out("the picture tokenizer", f"{' and '.join(absent)} not installed")
        return
    import diffusers
    from PIL import Image

    from mom_tokenizers.image.autoencoder import VQImageTokenizer

    side, number, channels = (16, 2, (8, 8)) if findings.tiny else (256, 64, (64, 128, 128, 256))
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(number)]
    torch.manual_seed(0)
    model: Any = diffusers.VQModel(
        num_vq_embeddings=64, block_out_channels=channels, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
    )  # fmt: skip
    torch.nn.init.normal_(model.quantize.embedding.weight)
    few = pictures[:2]
    on_cpu = VQImageTokenizer(model, side).encode_batch(few)
    tokenizer = VQImageTokenizer(model.to(findings.device), side)
    tokenizer.encode_batch(pictures)  # warm
    codes, seconds = _clocked(findings, lambda: tokenizer.encode_batch(pictures))
    equal = float(np.mean([np.mean(a == b) for a, b in zip(on_cpu, codes, strict=False)]))
    what = f"a VQ tokenizer, random weights, {side} x {side} pixels"
    found = f"{100 * equal:.2f} % of the codes equal the CPU's"
    findings.row(_MORE, what=what, figure=f"{number / seconds:,.1f} pictures/s", found=found)
    if equal < 0.98:  # two codes may be equally near up to rounding
        findings.wrong(f"tokenizers: only {100 * equal:.2f} % of the codes equal the CPU's")
