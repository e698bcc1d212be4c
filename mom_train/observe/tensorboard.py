"""Writes the figures and samples of a run to TensorBoard, with charts grouped by question. Used by rank 0."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mom_train.config.model import QUARTERS
from mom_train.config.run import RunConfig
from mom_train.generate.contact_sheet import MOST, contact_sheet
from mom_train.generate.samples import Span

if TYPE_CHECKING:  # importing it takes a second
    from torch.utils.tensorboard import SummaryWriter


FLOPS_AXIS = "flops_axis/"
"""Prefix of the names of curves that show a loss over training GFLOPs instead of over steps."""


_PROBE_BYTES = 1 << 16  # bytes that a disk must accept before events are written to it again


_POINTS = 1000  # points of a curve over FLOPs that are rewritten on a resume; TensorBoard shows no more of any curve


_SHARES = "FLOP/s as a share of the card's peak and of a matrix product"


_EVALUATIONS = {
    "recall1": "retrieval: share of queries whose likeliest answer is right",
    "recall1_pmi": "retrieval by PMI: the same, with the likelihood of the answer by itself taken off",
    "minimal_pairs": "minimal pairs: share of right utterances that are likelier",
}


_STATISTICS = {
    "rms": "root mean square of the residual stream behind each block, by modality",
    "max": "its largest magnitude",
    "update": "size of the update over that of the weights",
}


class TensorBoard:
    """Writes RUN/tensorboard: scalars, charts grouped by question (tab "Custom scalars"), the config, samples (text,
    images, audio), and hyperparameters beside the last figures (tab "HParams").

    Figures that earlier starts of the run logged after step `resumed_at` are removed; `lines` are those that stay. If
    writing raises an OSError, for example on a full disk, the scalars are kept and written with the next ones.
    """

    def __init__(self, config: RunConfig, resumed_at: int, lines: Sequence[Mapping[str, float]]):
        # Imported here because it takes a second, and only rank 0 needs it.
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.place = config.run_dir / "tensorboard"
        self._waiting: list[tuple[int, Mapping[str, float]]] = []
        # At the first start purge_step is 0: TensorBoard purges only from its second "session start" on, and
        # SummaryWriter writes a session start only if purge_step is given.
        purge = resumed_at + 1 if resumed_at else 0
        self._writer: SummaryWriter | None = SummaryWriter(str(self.place), purge_step=purge)
        self._writer.add_custom_scalars(layout(config))
        self._writer.add_text("config", f"```yaml\n{config.to_yaml()}```", 0)
        for summary in hparams(hyperparameters(config), dict.fromkeys(_judged_by(config))):
            self._writer._get_file_writer().add_summary(summary)  # add_hparams would create a separate run
        if purge:
            self._write_flops_axis_again(purge, lines)

    @contextmanager
    def _writing(self) -> Iterator[SummaryWriter]:
        """A context that gives the writer and flushes it at the end. A writer that has failed once fails always, so it
        is replaced by one with a new file as soon as the disk accepts data again."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            if self._writer is None:
                probe = self.place / ".probe"
                probe.write_bytes(bytes(_PROBE_BYTES))
                probe.unlink()
                self._writer = SummaryWriter(str(self.place))
            yield self._writer
            self._writer.flush()
        except OSError:
            if (failed := self._writer) is not None:
                self._writer = None
                with suppress(OSError):
                    failed.close()
            raise

    def _write_flops_axis_again(self, purge: int, lines: Sequence[Mapping[str, float]]) -> None:
        """Writes the curves over FLOPs again. Purging looks at the step number of a point, which counts GFLOPs in these
        curves, so it has removed their points from `purge` GFLOPs on."""
        stride = -(-len(lines) // _POINTS) if lines else 1
        for i, line in enumerate(lines):
            if i % stride == 0 or any(name.startswith("val/") for name in line):
                assert self._writer is not None
                self._write_flops_axis(self._writer, line, beyond=purge)

    @staticmethod
    def _write_flops_axis(writer: SummaryWriter, values: Mapping[str, float], beyond: int = 0) -> None:
        if "flops/total" not in values or (gflops := round(values["flops/total"] / 1e9)) < beyond:
            return
        for name, value in values.items():
            if name.startswith(("loss/", "val/")):
                writer.add_scalar(FLOPS_AXIS + name, value, gflops)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the values of a step."""
        self._waiting.append((step, values))
        self._write_waiting()

    def _write_waiting(self) -> None:
        with self._writing() as writer:
            for step, values in self._waiting:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
                self._write_flops_axis(writer, values)
        self._waiting.clear()

    def samples(self, step: int, documents: Sequence[Sequence[Span]]) -> None:
        """Logs the documents that the model wrote at `step`, with their pictures and recordings, and all pictures once
        more as one, each above the prompt of its document."""
        with self._writing() as writer:
            for n, spans in enumerate(documents):
                writer.add_text(f"samples/{n}", "\n\n".join(_readable(span) for span in spans), step)
                for span in spans:
                    if span.modality == "image" and span.decoded is not None:
                        picture = np.asarray(span.decoded.convert("RGB"))
                        writer.add_image(f"samples/{span.name}", picture, step, dataformats="HWC")
                    elif span.modality != "text" and span.decoded is not None:
                        waveform, rate = span.decoded
                        writer.add_audio(f"samples/{span.name}", waveform[None], step, rate)
            if drawn := _captioned(documents):
                sheet = np.asarray(contact_sheet(drawn[:MOST]))
                writer.add_image("samples/grid", sheet, step, dataformats="HWC")

    def close(self) -> None:
        self._write_waiting()
        assert self._writer is not None
        self._writer.close()


def _captioned(documents: Sequence[Sequence[Span]]) -> list[tuple[Any, str]]:
    """Each picture of the documents, with its name and the prompt of its document."""
    drawn = []
    for n, spans in enumerate(documents):
        prompt = next((str(span.decoded) for span in spans if span.name == f"{n}"), "no prompt")
        pictures = [span for span in spans if span.modality == "image" and span.decoded is not None]
        drawn += [(span.decoded, f"{span.name}: {prompt}") for span in pictures]
    return drawn


def _readable(span: Span) -> str:
    """The span as Markdown. Text that the model wrote is quoted, so that it is not read as markup."""
    if span.modality != "text":
        return f"*{span.markdown}*"
    quoted = "\n".join(f"    {line}" for line in span.markdown.splitlines())
    return quoted or "    "


def layout(config: RunConfig) -> dict[str, dict[str, list[Any]]]:
    """The charts of each question, for `add_custom_scalars`. TensorBoard reads the names as regular expressions."""
    modalities, sets = config.layout.modalities, list(config.data.validation)
    attention = config.model.architecture == "transformer"
    projections = ["qkv_proj", "out_proj", "gate_up_proj", "down_proj"] if attention else []
    projections = projections or ["in_proj", "x_proj", "dt_proj", "out_proj"]

    def chart(*names: str) -> list[Any]:
        return ["Multiline", [f"^{re.escape(name)}$" for name in names]]

    losses = [f"loss/{m}" for m in modalities]
    validation = {f"{s}: loss by modality": chart(*(f"val/{s}/{loss}" for loss in losses)) for s in sets}
    if len(sets) > 1:
        validation |= {f"{m}: loss by set": chart(*(f"val/{s}/loss/{m}" for s in sets)) for m in modalities}
    if sets and config.tokenizers is not None:
        validation["text: bits per byte"] = chart(*(f"val/{s}/bits_per_byte/text" for s in sets))
    if config.objective.diffusion is not None:
        validation |= {
            f"{s}: squared error by quarter of the timesteps": chart(*(f"val/{s}/mse/t{q}" for q in range(QUARTERS)))
            for s in sets
        }
    charts = {
        "Does it learn?": {
            "loss by modality": chart(*losses),
            "loss in total": chart("loss/total"),
            "learning rate": chart("learning_rate"),
            **({"batch": chart("batch")} if config.training.batch_ramp else {}),
        },
        "Does it generalise?": validation,
        "For how much compute? (x: training GFLOPs)": {
            "loss by modality": chart(*(FLOPS_AXIS + loss for loss in losses)),
            **{f"{s}: loss by modality": chart(*(f"{FLOPS_AXIS}val/{s}/{loss}" for loss in losses)) for s in sets},
        },
        "Is it stable?": {
            "gradient norm": chart("grad_norm/total"),
            "gradient norm by projection": chart(*(f"grad_norm/{p}" for p in (*projections, "embedding", "head"))),
            "gradient norm by modality": chart(*(f"grad_norm/{m}" for m in modalities)),
            **({"z-loss per target": chart("z_loss")} if config.objective.z_loss else {}),
            "bad steps, damaged documents": chart("anomaly/skipped", "data/damaged"),
        },
        "Is it fast?": {
            "tokens per second": chart("perf/tokens_per_s"),
            "share of the time spent waiting: for data, for the slowest rank": chart(
                "perf/data_wait", "perf/straggling"
            ),
            "seconds that a checkpoint takes from training": chart("checkpoint/stall_s"),
            _SHARES: ["Multiline", ["^perf/(mfu|gemm_share)$"]],
            "goodput: share of the wall time in steps that are in the run": chart("perf/goodput"),
            "where the wall time went": ["Multiline", ["^perf/time/.*$"]],
        },
        "What has it seen?": {
            "tokens by modality": chart(*(f"tokens/{m}" for m in modalities)),
            "training FLOPs": chart("flops/total"),
        },
    }
    if config.evaluation.every is not None:
        charts["What can it do?"] = {
            f"{title}; chance": [
                "Multiline",
                [f"^eval/.*/{figure}/.*$", f"^eval/.*/chance/{figure.removesuffix('_pmi')}$"],
            ]
            for figure, title in _EVALUATIONS.items()
        }
        gains = "nats per unit that text before a segment, or a segment before text, takes off the loss"
        charts["What can it do?"][gains] = ["Multiline", ["^eval/.*/gain/.*$"]]
    if config.observe.statistics_every is not None:
        for figure, title in _STATISTICS.items():
            charts["Is it stable?"][title] = ["Multiline", [f"^stats/{figure}/.*$"]]
    if torch.cuda.is_available():
        memory = chart("perf/memory_peak_gib", "perf/memory_predicted_gib")
        charts["Is it fast?"]["memory of rank 0 in GiB: measured and predicted"] = memory
    if not config.observe.gemm and not torch.cuda.is_available():
        del charts["Is it fast?"][_SHARES]
    if not config.model.decoupled:
        del charts["Is it stable?"]["gradient norm by modality"]
    return {question: named for question, named in charts.items() if named}


def hyperparameters(config: RunConfig) -> dict[str, int | float | str | bool]:
    """Settings that distinguish runs, by dotted key: the architecture, the seed, the sequence length, and the keys of
    vocabulary, model, objective, optimizer and training that differ from their defaults."""
    found: dict[str, int | float | str | bool] = {"model.architecture": config.model.architecture, "seed": config.seed}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                collect(f"{prefix}.{key}", inner)
        elif isinstance(value, list | tuple):
            found[prefix] = " ".join(map(str, value)) or "none"
        elif value is not None:
            found[prefix] = value

    sections = ("vocabulary", "model", "objective", "optimizer", "training")
    for section, value in config.model_dump(mode="json", include={*sections}, exclude_defaults=True).items():
        collect(section, value)
    return found | {"data.sequence_length": config.data.sequence_length}


def _judged_by(config: RunConfig) -> list[str]:
    names = [f"loss/{m}" for m in ("total", *config.layout.modalities)]
    return [*names, *(f"val/{s}/{name}" for s in config.data.validation for name in names)]
