"""A whole run: every section and key with its type, default and meaning. Impossible values are errors."""

from __future__ import annotations

import difflib
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    PositiveInt,
    model_validator,
)

from mom_tokenizers.errors import UserError
from mom_tokenizers.vocab import VocabLayout
from mom_train.config.data import DataConfig
from mom_train.config.migrations import SCHEMA
from mom_train.config.model import QUARTERS, ModelConfig, ObjectiveConfig
from mom_train.config.section import Name, Section

Recompute = bool | Literal["selective"]


_YEAR = 365 * 24 * 3600.0


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    warmup: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Decay after the warm-up."""
    final_fraction: float = Field(0.1, ge=0, le=1)
    """Learning rate of the last step, as a fraction of the peak (cosine)."""
    weight_decay: float = Field(0.1, ge=0)
    """On matrices only: not on norms, biases, A_log and D."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of AdamW's two moments."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon. Without it, an id that no row has held yet would become NaN (0 / 0)."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the whole gradient."""


class TrainingConfig(Section):
    steps: PositiveInt
    """Optimiser steps of the whole run (what the schedule counts to)."""
    batch: PositiveInt
    """Sequences per optimiser step, over all ranks."""
    micro_batch: PositiveInt
    """Sequences per rank and forward pass; the rest of `batch` is accumulated."""
    stop_at: PositiveInt | None = None
    """Checkpoint and end cleanly after this step, to carry on another time."""
    time_limit: float | None = Field(None, gt=0)
    """Seconds after which the run checkpoints and ends as if it were preempted: a little less than the job's."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the matrix products (autocast). Parameters, norms, scan, time steps and losses are fp32 in any case."""
    activation_checkpointing: Recompute = False
    """Recompute each block in the backward pass instead of keeping its activations: true, all of it; selective, all but
    what is dear (large products, scan, attention), at little cost in time."""
    compile: bool = False
    """torch.compile each block."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep an exponential moving average of the weights with this decay, such as 0.999."""


class ValidationConfig(Section):
    every: PositiveInt | None = None
    """Steps between validations; one always follows the last step. Nothing by default but that one."""
    sequences: PositiveInt | None = 64
    """Most sequences of each set, the same ones each time: the first of one pass over its documents. A set of fewer is
    taken whole, each document once. null: every set whole."""
    ema: bool = False
    """Validate, and sample from, the averaged weights (training.ema_decay) in place of those being trained."""


class PromptConfig(Section):
    """What a sampled document begins with."""

    text: str = ""
    """Text after the document's opening token."""
    start: Name | None = None
    """A modality whose span is opened after the text: the model fills it."""


class SamplingConfig(Section):
    """Documents that the model writes while it trains, to look at and listen to: RUN/samples/step-N and TensorBoard.
    Rank 0 holds the whole model once more for it, and the other ranks wait. Needs `tokenizers`."""

    every: PositiveInt | None = None
    """Steps between samples; they also follow the last step. null: none at all."""
    prompts: tuple[PromptConfig, ...] = (PromptConfig(),)
    """One document each, with the same random draws every time."""
    max_tokens: PositiveInt = 128
    """Positions of a document, the prompt's included. A picture or recording that has begun is finished."""
    temperature: float = Field(default=0.9, ge=0)
    """0 takes the likeliest id."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Ids are drawn from the likeliest ones that together have this probability."""
    denoising_steps: PositiveInt = 25
    """Of a continuous picture."""
    guidance: float = Field(default=1.0, ge=0)
    """Classifier-free guidance of continuous pictures (needs objective.diffusion.condition_dropout); 1 is none."""
    seconds: float = Field(default=120.0, gt=0)
    """No further document is begun once so many have passed."""


class WandbConfig(Section):
    """Weights & Biases beside metrics.jsonl and TensorBoard; needs `pip install wandb`."""

    project: Name
    """Name of the project."""
    entity: Name | None = None
    """Account or team; null: the login's own."""
    name: Name | None = None
    """Of the run; null: the run_dir's."""
    group: Name | None = None
    """Runs that belong together, such as the seeds of one experiment."""
    tags: tuple[Name, ...] = ()
    """Words to find the run by."""
    mode: Literal["online", "offline"] = "online"
    """`offline` keeps everything in RUN/wandb, for `wandb sync` later: compute nodes often have no network."""


class CheckpointConfig(Section):
    every: PositiveInt | None = None
    """Steps between checkpoints; one always follows the last step."""
    seconds: float | None = Field(default=None, gt=0)
    """Seconds between checkpoints, besides those by steps."""
    keep: PositiveInt = 2
    """The newest so many are kept; older ones are deleted."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that this divides are made, and kept for good."""
    max_failures: PositiveInt = 3
    """A checkpoint that cannot be written is reported and training goes on; so many in a row end the run."""
    best: Name | None = None
    """A validation figure, such as val/demo/loss/total: whenever it is lower than ever before, a checkpoint is made,
    which BEST then names and which is kept beside the newest ones until a better one comes."""
    path: Name | None = None
    """Where checkpoints and LATEST go instead of the run_dir: a folder, or a URL such as s3://bucket/run."""


class AnomalyConfig(Section):
    """Steps that go bad: skipped; too many in a row, and the run goes back to its last checkpoint and leaves that data
    out; and when that does not help, it ends with incident.json."""

    loss_spike: float | None = Field(default=None, gt=1)
    """Skip a step whose loss exceeds this many times the median of the last good steps; null: only one that is not
    finite."""
    grad_norm_spike: float | None = Field(default=None, gt=1)
    """The same for the norm of the gradient before clipping."""
    window: int = Field(default=64, ge=16)
    """Good steps that the medians are of."""
    skips: PositiveInt = 5
    """Bad steps in a row before the run goes back."""
    rollbacks: int = Field(default=2, ge=0)
    """How often it goes back before it ends."""


class ParallelConfig(Section):
    """How ranks share the work. Nothing here changes the result."""

    shard_ranks: PositiveInt | None = None
    """Ranks that share one copy of the model (HSDP): those of a node, where its links are much faster than the
    network. null: all of them."""
    context_ranks: PositiveInt = 1
    """Ranks that share each row, for rows too long for one: each has one slice of the positions, and the scan's state
    goes from slice to slice (Mamba only)."""
    cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimiser state in host memory."""
    first_step_timeout: float = Field(default=1800, gt=0, le=_YEAR)
    """Seconds that a collective may take until the first step is done: compilation, cold caches and file systems."""
    timeout: float = Field(default=600, gt=0, le=_YEAR)
    """The same from then on. A rank that hangs ends the run after it; the stacks of all ranks are in RUN/stacks."""
    dry_run: bool | None = None
    """Before the first step, one pass over a full batch that is not trained on, so that memory that does not suffice
    shows at once. null: on GPUs."""


class RunConfig(Section):
    """One training run."""

    run_dir: Path
    """Where everything of the run goes. A run that has a checkpoint there carries on from it."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the initial weights and the order of the data."""
    vocabulary: dict[str, PositiveInt] | Path
    """Number of ids of each modality, text first; this order numbers the modalities. Or a layout.json, as
    tools/map_vocabulary.py writes it, where codes live inside an existing text vocabulary."""
    tokenizers: Path | None = None
    """tokenizers.yaml of the tokenizers meant for this run: their fingerprints must be the shards'."""
    init_from: Path | None = None
    """Weights to start from: another run, or safetensors of ours or of a published Mamba-1. A dense model's weights
    fill every modality of a mixture (upcycling). What the source holds or says and this model is not, is an error."""
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    anomaly: AnomalyConfig = AnomalyConfig()
    parallel: ParallelConfig = ParallelConfig()
    sampling: SamplingConfig = SamplingConfig()
    wandb: WandbConfig | None = None
    """Weights & Biases besides; null: not used."""
    log_every: PositiveInt = 1
    """Steps between lines of metrics.jsonl."""

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        _ = self.layout  # raises where it cannot be
        training = self.training
        if self.optimizer.warmup >= training.steps:
            raise UserError(
                f"optimizer.warmup ({self.optimizer.warmup}) must be below training.steps ({training.steps})"
            )
        if training.batch % training.micro_batch:
            raise UserError(
                f"training.batch ({training.batch}) must be a multiple of training.micro_batch ({training.micro_batch})"
            )
        if self.validation.ema and training.ema_decay is None:
            raise UserError("validation.ema needs training.ema_decay")
        self._check_context()
        self._check_data()
        self._check_diffusion()
        self._check_sampling()
        best = self.checkpoint.best
        if best is not None and best not in self.figures:
            close = difflib.get_close_matches(best, self.figures, n=1)
            hint = f"did you mean {close[0]}?" if close else f"these are: {', '.join(self.figures) or 'none here'}"
            raise UserError(f"checkpoint.best={best} is no figure of a validation set; {hint}")
        return self

    @property
    def figures(self) -> list[str]:
        """Names of what a validation can find; a modality that a set has no targets of is missing there."""
        names = [f"loss/{m}" for m in ("total", *self.layout.modalities)]
        names += ["bits_per_byte/text"] if self.tokenizers is not None else []
        names += [f"mse/t{q}" for q in range(QUARTERS)] if self.objective.diffusion is not None else []
        return [f"val/{name}/{figure}" for name in self.data.validation for figure in names]

    def _check_data(self) -> None:
        data = self.data
        if not data.train:
            raise UserError("data.train: name at least one source")
        for name, sources in data.validation.items():
            if not name or "/" in name:
                raise UserError(f"data.validation: {name!r} is no name of a set: it must not be empty or hold a /")
            if not sources:
                raise UserError(f"data.validation.{name}: name at least one source")
        if self.validation.every is not None and not data.validation:
            raise UserError("validation.every: there is nothing to validate on; name a set in data.validation")
        if self.tokenizers is None and any(s.raw for s in (*data.train, *chain(*data.validation.values()))):
            raise UserError("tokenizers: raw sources are tokenized online, so name the tokenizers.yaml to do it with")
        if data.corrupt_share and len(self.layout.modalities) < 2:
            raise UserError("data.corrupt_share: the vocabulary has one modality, so there is no other to route to")

    def _check_diffusion(self) -> None:
        if self.objective.diffusion is not None and "image" not in self.layout.modalities:
            raise UserError(
                "objective.diffusion denoises pictures, and the vocabulary has no modality 'image' "
                f"(only {', '.join(self.layout.modalities)}); add image: 1, or leave objective.diffusion out"
            )

    def _check_sampling(self) -> None:
        sampling, diffusion = self.sampling, self.objective.diffusion
        for prompt in sampling.prompts:
            if prompt.start is not None and prompt.start not in self.layout.modalities[1:]:
                further = ", ".join(self.layout.modalities[1:]) or "none here"
                raise UserError(f"sampling.prompts: start={prompt.start}: the modalities beside text are {further}")
        self.check_guidance(sampling.guidance)
        if sampling.every is None:
            return
        if self.tokenizers is None:
            raise UserError("sampling.every: name the tokenizers.yaml that writes and reads the samples (tokenizers)")
        if not sampling.prompts:
            raise UserError("sampling.prompts: name at least one, such as {text: ''}")
        if diffusion is not None and sampling.denoising_steps > diffusion.steps:
            raise UserError(
                f"sampling.denoising_steps={sampling.denoising_steps} is above objective.diffusion.steps="
                f"{diffusion.steps}: there are no more timesteps than that"
            )

    def _check_context(self) -> None:
        context, length = self.parallel.context_ranks, self.data.sequence_length
        if context == 1:
            return
        if self.model.architecture != "mamba":
            raise UserError(
                "parallel.context_ranks: only a mamba's state can go from rank to rank; attention needs whole rows"
            )
        if length % context or length // context < self.model.conv - 1:
            raise UserError(
                f"parallel.context_ranks={context} must divide data.sequence_length={length} into slices of at least "
                f"{self.model.conv - 1} positions"
            )

    def check_guidance(self, guidance: float) -> None:
        """Raises UserError for guidance of a model that has learned no unconditional side, here or where it started."""
        diffusion = self.objective.diffusion
        if guidance != 1 and (diffusion is None or not (diffusion.condition_dropout or self.init_from)):
            raise UserError(
                f"sampling.guidance={guidance} needs a model that has learned to paint without its text: "
                "set objective.diffusion.condition_dropout, such as 0.1, or leave guidance at 1"
            )

    @cached_property
    def layout(self) -> VocabLayout:
        """Where each modality's ids lie. Raises ValueError where the vocabulary cannot be laid out."""
        return VocabLayout.of(self.vocabulary)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per rank and step. Raises ValueError when the batch cannot be dealt evenly."""
        context = self.parallel.context_ranks
        if world_size % context:
            raise UserError(f"parallel.context_ranks={context} does not divide the {world_size} ranks")
        rows = world_size // context  # as many ranks hold different rows
        per_pass = self.training.micro_batch * rows
        if self.training.batch % per_pass:
            shared = f" / parallel.context_ranks ({world_size} / {context})" if context > 1 else ""
            raise UserError(
                f"training.batch ({self.training.batch}) must be a multiple of training.micro_batch x ranks{shared} "
                f"({self.training.micro_batch} x {rows} = {per_pass})"
            )
        return self.training.batch // per_pass

    def to_dict(self) -> dict[str, Any]:
        """Its values as JSON has them, behind the number of their schema: what runs and checkpoints keep of it."""
        return {"schema": SCHEMA, **self.model_dump(mode="json")}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)
