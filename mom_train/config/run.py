"""The config of a whole run: every section and key with its type, default and meaning, and what values it refuses."""

from __future__ import annotations

import difflib
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, model_validator

from mom_tokenizers.errors import UserError
from mom_tokenizers.vocab import VocabLayout
from mom_train.config.branch import BranchConfig
from mom_train.config.data import DataConfig
from mom_train.config.evaluation import EvaluationConfig
from mom_train.config.migrations import SCHEMA
from mom_train.config.model import QUARTERS, ModelConfig, ObjectiveConfig, PictureShapesConfig
from mom_train.config.observe import ObserveConfig
from mom_train.config.optimizer import OptimizerConfig
from mom_train.config.sampling import PromptConfig, SamplingConfig
from mom_train.config.section import Name, Section

Recompute = bool | Literal["selective"]


_YEAR = 365 * 24 * 3600.0


class RampConfig(Section):
    """A part of the run with a smaller batch than later parts."""

    until: PositiveInt
    """Number of steps, counted from the start of the run, after which this batch is over."""
    batch: PositiveInt
    """Number of sequences per optimiser step until then, over all ranks together."""


class TrainingConfig(Section):
    """How long the run trains, on how much at a time, and with which numerics."""

    steps: PositiveInt
    """Number of optimiser steps of the whole run. The learning-rate schedule ends with the last of them."""
    batch: PositiveInt
    """Number of sequences per optimiser step, over all ranks together. With a batch_ramp, it is that of the steps after
    the ramp."""
    batch_ramp: tuple[RampConfig, ...] = ()
    """Smaller batches at the start of the run, in the order of their steps, each larger than the one before. The order
    of the data does not depend on it. Entries after the last step of the run are allowed and have no effect."""
    micro_batch: PositiveInt
    """Number of sequences per rank in one forward pass. Gradients are added up over passes until `batch` is reached."""
    stop_at: PositiveInt | None = None
    """Step after which the run writes a checkpoint and ends cleanly, to be continued another time."""
    time_limit: float | None = Field(None, gt=0)
    """Seconds after which the run writes a checkpoint and ends as if it were preempted. Set it a little below the time
    limit of the job."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Precision of the matrix products (autocast). Stored parameters, norms, the scan, its time steps and the
    losses are always fp32. With `bf16` and `fp8`, weights of products are also gathered from the ranks in bf16. `fp8`
    is bf16 with the large products in FP8 (e4m3, a scale for each row): outputs of the projections and gradients of
    their inputs, except x_proj and dt_proj, and the logits if the number of ids is a multiple of 16. It needs an NVIDIA
    GPU of compute capability 8.9 or more, and 9.0 (H100, H200) if projections are decoupled."""
    fp8_emulation: bool = False
    """Whether the products of `precision: fp8` are emulated in fp32 from the same rounded numbers. This runs on any
    device, slowly, and shows what FP8 does to the losses."""
    activation_checkpointing: Recompute = False
    """Whether the backward pass recomputes each block to save memory instead of keeping its activations. `true`
    recomputes all of the block. `selective` keeps the results that are expensive to recompute (large matrix products,
    scan, attention), so it costs little time."""
    compile: bool = False
    """Whether to compile each block with torch.compile."""
    cuda_graph: bool = False
    """Whether the forward and backward pass of a micro-batch is recorded once as a CUDA graph and then replayed, so
    that the GPU does not wait for the host. It is for one NVIDIA GPU and models of Mamba without latent patches. The
    gradients stay in memory between steps, and so does a bf16 copy of the matrices with precision bf16 and fp8."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, such as 0.999. null keeps no average."""

    @model_validator(mode="after")
    def _rises(self) -> TrainingConfig:
        sizes = [*self.batches.values()]
        for i, entry in enumerate(self.batch_ramp):
            if entry.batch >= sizes[i + 1]:
                later = [*self.batches][i + 1]
                raise UserError(f"batch_ramp.{i}.batch ({entry.batch}) must be below {later} ({sizes[i + 1]})")
            if i and entry.until <= self.batch_ramp[i - 1].until:
                raise UserError(
                    f"batch_ramp.{i}.until ({entry.until}) must be above that of the entry before "
                    f"({self.batch_ramp[i - 1].until})"
                )
        return self

    @property
    def batches(self) -> dict[str, int]:
        """Every size that a batch of this run has, by the key that names it, in the order of steps."""
        sizes = {f"training.batch_ramp.{i}.batch": entry.batch for i, entry in enumerate(self.batch_ramp)}
        return {**sizes, "training.batch": self.batch}

    def batch_at(self, step: int) -> int:
        """Number of sequences of the optimiser step `step`, counted from 0."""
        return next((entry.batch for entry in self.batch_ramp if step < entry.until), self.batch)

    def ramp_from(self, step: int) -> tuple[tuple[int, int], ...]:
        """What is left of the ramp before step `step`: (number of steps, batch) of each part, in order."""
        parts = []
        for entry in self.batch_ramp:
            if entry.until > step:
                parts.append((entry.until - step, entry.batch))
                step = entry.until
        return tuple(parts)

    def sequences_before(self, step: int) -> int:
        """Number of sequences that the steps before step `step` take together. So it is also the number of the first
        sequence of that step, where no data has been left out."""
        begun = total = 0
        for entry in self.batch_ramp:
            until = min(entry.until, step)
            total += (until - begun) * entry.batch
            begun = until
        return total + (step - begun) * self.batch

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(number of steps, batch) of each part of the run that has one batch, in order."""
        ends = [min(end, self.steps) for end in (0, *(entry.until for entry in self.batch_ramp), self.steps)]
        sizes = self.batches.values()
        return [(end - begin, batch) for (begin, end), batch in zip(pairwise(ends), sizes, strict=True) if end > begin]


class ValidationConfig(Section):
    """When the validation sets of `data.validation` are evaluated, and how much of them."""

    every: PositiveInt | None = None
    """Number of steps between validations. There is always one after the last step; null leaves only that one."""
    sequences: PositiveInt | None = 64
    """Largest number of sequences taken from each set. They are the same every time: the first ones of one pass over
    its documents. A smaller set is taken whole, each document once. null takes every set whole."""
    ema: bool = False
    """Whether validation and sampling use the averaged weights (training.ema_decay) instead of the trained ones."""


class WandbConfig(Section):
    """Logging to Weights & Biases in addition to metrics.jsonl and TensorBoard. It needs `pip install wandb`."""

    project: Name
    """Name of the project."""
    entity: Name | None = None
    """Account or team that owns the project. null takes the account that is logged in."""
    name: Name | None = None
    """Name of the run there. null takes the name of the run_dir."""
    group: Name | None = None
    """Name of a group of runs that belong together, such as the seeds of one experiment."""
    tags: tuple[Name, ...] = ()
    """Words by which the run can be found."""
    mode: Literal["online", "offline"] = "online"
    """`online` sends everything as it is logged. `offline` keeps it in RUN/wandb to be sent later with `wandb sync`,
    because compute nodes often have no network."""


class CheckpointConfig(Section):
    """When checkpoints are written, where, and how many are kept."""

    every: PositiveInt | None = None
    """Number of steps between checkpoints. There is always one after the last step."""
    seconds: float | None = Field(default=None, gt=0)
    """Number of seconds between checkpoints, in addition to those made every so many steps."""
    keep: PositiveInt = 2
    """Number of newest checkpoints that are kept. Older ones are deleted."""
    keep_every: PositiveInt | None = None
    """A checkpoint is made at every step that this number divides, and it is never deleted."""
    max_failures: PositiveInt = 3
    """Number of failures in a row that end the run. After fewer, the failure to write a checkpoint is only reported and
    training continues."""
    best: Name | None = None
    """Name of a validation figure, such as val/demo/loss/total. Whenever it is lower than ever before, a checkpoint is
    made. The file BEST names it, and it is kept in addition to the newest ones until a better one is made."""
    path: Name | None = None
    """Folder or URL, such as s3://bucket/run, that checkpoints and the file LATEST are written to instead of the
    run_dir."""


class AnomalyConfig(Section):
    """What happens at a bad step, one whose loss or gradient is not finite or far too large. Its update is skipped.
    After too many in a row, the run goes back to its last checkpoint and leaves out the data of these steps. If that
    does not help, the run ends and writes incident.json."""

    loss_spike: float | None = Field(default=None, gt=1)
    """A step is bad if its loss exceeds this many times the median loss of the last good steps. null makes it bad only
    if its loss is not finite."""
    grad_norm_spike: float | None = Field(default=None, gt=1)
    """The same as `loss_spike`, for the norm of the gradient before clipping."""
    window: int = Field(default=64, ge=16)
    """Number of last good steps that the medians are taken over."""
    skips: PositiveInt = 5
    """Number of bad steps in a row after which the run goes back to its last checkpoint."""
    rollbacks: int = Field(default=2, ge=0)
    """Number of times that the run may go back. After that, it ends instead."""


class ParallelConfig(Section):
    """How ranks share the work. No key here changes the result."""

    shard_ranks: PositiveInt | None = None
    """Number of ranks that share one copy of the model (HSDP). Choose the number of ranks of a node if the links inside
    a node are much faster than the network. null lets all ranks share one copy."""
    context_ranks: PositiveInt = 1
    """Number of ranks that share each row, for rows that are too long for one rank. Each rank has one slice of the
    positions, and the state of the scan is passed from slice to slice (Mamba only)."""
    cpu_offload: bool = False
    """Whether to keep sharded parameters, gradients and optimiser state in host memory."""
    first_step_timeout: float = Field(default=1800, gt=0, le=_YEAR)
    """Seconds that a collective operation may take before the first step is done, while code is compiled and caches
    and file systems are cold."""
    timeout: float = Field(default=600, gt=0, le=_YEAR)
    """Seconds that a collective operation may take after the first step. If a rank hangs for longer, the run ends, and
    the stacks of all ranks are in RUN/stacks."""
    dry_run: bool | None = None
    """Whether to make one pass over a full batch before the first step, without training on it, so that too little
    memory shows at once. null does so on GPUs only."""


class RunConfig(Section):
    """One training run."""

    run_dir: Path
    """Folder that everything of the run is written to. If it holds a checkpoint, the run continues from it."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights and of the order of the data."""
    vocabulary: dict[str, PositiveInt] | Path
    """Number of ids of each modality, text first; this order numbers the modalities. If the codes lie inside an
    existing text vocabulary, it is the path of the layout.json that tools/map_vocabulary.py wrote."""
    picture_shapes: PictureShapesConfig | None = None
    """The shapes that pictures may have besides the square; each of them adds a special token that opens a picture of
    this shape. null allows square pictures only."""
    tokenizers: Path | None = None
    """Path of the tokenizers.yaml that lists the tokenizers of this run. Their fingerprints must equal those recorded
    in the token shards."""
    init_from: Path | None = None
    """Weights to start from: another run, or safetensors that were exported from a run or that belong to a published
    Mamba-1. The weights of a dense model are copied to every modality of a mixture (upcycling). Weights or settings of
    the source that do not fit this model are an error."""
    branch: BranchConfig | None = None
    """The checkpoint of another run that this run begins from. null begins a run of its own."""
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    anomaly: AnomalyConfig = AnomalyConfig()
    parallel: ParallelConfig = ParallelConfig()
    sampling: SamplingConfig = SamplingConfig()
    observe: ObserveConfig = ObserveConfig()
    wandb: WandbConfig | None = None
    """Logging to Weights & Biases. null does without it."""
    log_every: PositiveInt = 1
    """Number of steps between lines of metrics.jsonl."""

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        _ = self.layout  # raises an error if the vocabulary cannot be laid out
        training = self.training
        if self.optimizer.warmup >= training.steps:
            raise UserError(
                f"optimizer.warmup ({self.optimizer.warmup}) must be below training.steps ({training.steps})"
            )
        decay = self.optimizer.decay
        if decay is not None and self.optimizer.warmup + decay > training.steps:
            raise UserError(
                f"optimizer.warmup ({self.optimizer.warmup}) and optimizer.decay ({decay}) together are longer than "
                f"training.steps ({training.steps})"
            )
        if self.optimizer.scale_with_batch and not training.batch_ramp:
            raise UserError("optimizer.scale_with_batch: the batch is always the same; name a training.batch_ramp")
        for key, batch in training.batches.items():
            if batch % training.micro_batch:
                raise UserError(f"{key} ({batch}) must be a multiple of training.micro_batch ({training.micro_batch})")
        if self.branch is not None and self.branch.step >= training.steps:
            raise UserError(f"branch.step ({self.branch.step}) must be below training.steps ({training.steps})")
        if self.validation.ema and training.ema_decay is None:
            raise UserError("validation.ema needs training.ema_decay")
        self._check_fp8()
        self._check_cuda_graph()
        self._check_muon()
        self._check_observe()
        self._check_context()
        self._check_data()
        self._check_evaluation()
        self._check_diffusion()
        self._check_sampling()
        best = self.checkpoint.best
        if best is not None and best not in self.figures:
            close = difflib.get_close_matches(best, self.figures, n=1)
            hint = f"did you mean {close[0]}?" if close else f"they are: {', '.join(self.figures) or 'none here'}"
            raise UserError(f"checkpoint.best={best} is not a figure of a validation set; {hint}")
        return self

    @property
    def figures(self) -> list[str]:
        """Names of the figures that validation can report. A set that has no targets of a modality lacks its loss."""
        names = [f"loss/{m}" for m in ("total", *self.layout.modalities)]
        names += ["bits_per_byte/text"] if self.tokenizers is not None else []
        names += [f"mse/t{q}" for q in range(QUARTERS)] if self.objective.diffusion is not None else []
        return [f"val/{name}/{figure}" for name in self.data.validation for figure in names]

    def _check_observe(self) -> None:
        training = self.training
        if (profiled := self.observe.profile_steps) is not None and profiled[1] > training.steps:
            raise UserError(f"observe.profile_steps: {profiled[1]} is beyond training.steps ({training.steps})")
        if (every := self.observe.statistics_every) is not None and every % self.log_every:
            raise UserError(
                f"observe.statistics_every ({every}) must be a multiple of log_every ({self.log_every}), because only "
                "logged steps show statistics"
            )
        if self.observe.statistics_every is not None and training.compile:
            raise UserError("observe.statistics_every needs training.compile=false: compiled blocks take no hooks")

    def _check_data(self) -> None:
        data = self.data
        if not data.train:
            raise UserError("data.train: name at least one source")
        for name, sources in data.validation.items():
            if not name or "/" in name:
                raise UserError(f"data.validation: {name!r} is not a name for a set: it is empty or contains a /")
            if not sources:
                raise UserError(f"data.validation.{name}: name at least one source")
        if self.validation.every is not None and not data.validation:
            raise UserError("validation.every: there is nothing to validate on; name a set in data.validation")
        further = chain(*data.validation.values(), *self.evaluation.minimal_pairs.values())
        if self.tokenizers is None and any(s.raw for s in (*data.train, *further)):
            raise UserError("tokenizers: raw sources are tokenized online, so name the tokenizers.yaml to use")
        if data.corrupt_share and len(self.layout.modalities) < 2:
            raise UserError("data.corrupt_share: the vocabulary has one modality, so there is no other to route to")

    def _check_evaluation(self) -> None:
        if self.evaluation.every is None:
            if self.evaluation.minimal_pairs:
                raise UserError("evaluation.minimal_pairs: nothing is evaluated; set evaluation.every")
            return
        if not self.data.validation:
            raise UserError("evaluation.every: there is nothing to evaluate on; name a set in data.validation")
        for name, sources in self.evaluation.minimal_pairs.items():
            if not name or "/" in name or name in self.data.validation:
                raise UserError(
                    f"evaluation.minimal_pairs: {name!r} is not a name for a set: it is empty, contains a /, or is "
                    "that of a set of data.validation"
                )
            if not sources:
                raise UserError(f"evaluation.minimal_pairs.{name}: name at least one source")
        if len(self.layout.modalities) < 2:
            raise UserError("evaluation.every: the vocabulary has text alone, and nothing to retrieve with it")

    def _check_fp8(self) -> None:
        model = self.model
        if self.training.precision != "fp8":
            if self.training.fp8_emulation:
                raise UserError("training.fp8_emulation: there is nothing to emulate; set training.precision: fp8")
            return
        inner = model.feed_forward if model.architecture == "transformer" else model.inner
        if model.dim % 16 or inner % 16:
            raise UserError(
                f"training.precision: fp8 needs widths that are multiples of 16, and the model has {model.dim} and "
                f"{inner}; change model.dim, or set training.precision: bf16"
            )

    def _check_cuda_graph(self) -> None:
        if not self.training.cuda_graph:
            return
        obstacles = {
            "model.architecture: transformer": self.model.architecture == "transformer"
            and "the mask of its attention has another number of blocks in every batch",
            "objective.diffusion": self.objective.diffusion is not None
            and "every batch has another number of latent patches",
            "parallel.context_ranks": self.parallel.context_ranks > 1
            and "what ranks send to each other is not recorded",
            "parallel.cpu_offload": self.parallel.cpu_offload and "a graph cannot fetch weights from host memory",
            "training.fp8_emulation": self.training.fp8_emulation and "the emulation reads the bounds on the host",
            "observe.statistics_every": self.observe.statistics_every is not None and "what is replayed calls no hooks",
        }
        for key, why in obstacles.items():
            if why:
                raise UserError(f"training.cuda_graph does not go together with {key}: {why}; leave one of them out")

    def _check_muon(self) -> None:
        if (muon := self.optimizer.as_muon) is None:
            return
        muon.names(self.model)
        if self.parallel.cpu_offload:
            raise UserError(
                "parallel.cpu_offload: the products of Muon would be computed on the host, which is too slow; set "
                "optimizer.kind: adamw, or leave cpu_offload out"
            )

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
                raise UserError(f"sampling.prompts: start={prompt.start}: the modalities besides text are {further}")
            self.grid_of(prompt)
        self.check_guidance(sampling.guidance)
        if sampling.every is None:
            return
        if self.tokenizers is None:
            raise UserError("sampling.every: samples need tokenizers; name their tokenizers.yaml (tokenizers)")
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
                "parallel.context_ranks: only the state of a mamba can go from rank to rank; attention needs whole rows"
            )
        if length % context or length // context < self.model.conv - 1:
            raise UserError(
                f"parallel.context_ranks={context} must divide data.sequence_length={length} into slices of at least "
                f"{self.model.conv - 1} positions"
            )

    def check_guidance(self, guidance: float) -> None:
        """Raises UserError if guidance is asked of a model without pictures, or of one that has not learned to denoise
        without its condition, neither in this run nor, as far as can be known here, in the one that it started from."""
        if guidance == 1:
            return
        if "image" not in self.layout.modalities:
            raise UserError(f"sampling.guidance={guidance}: only pictures are guided, and this run has none")
        diffusion = self.objective.diffusion
        if diffusion is not None and not (diffusion.condition_dropout or self.init_from):
            raise UserError(
                f"sampling.guidance={guidance} needs a model that has learned to make pictures without text: "
                "set objective.diffusion.condition_dropout, such as 0.1, or leave guidance at 1"
            )

    def grid_of(self, prompt: PromptConfig) -> tuple[int, int] | None:
        """(rows, columns) of the picture that a prompt opens, None for a square one. Raises UserError for a shape that
        the run's pictures do not have."""
        if prompt.shape is None:
            return None
        if prompt.start != "image":
            raise UserError(f"shape {prompt.shape}: only a picture has one; it needs start: image")
        shapes = self.layout.shapes
        if shapes is None:
            raise UserError(
                f"shape {prompt.shape}: all pictures of this run are square, because its config has no picture_shapes"
            )
        grid = shapes.asked_for(prompt.shape)
        return None if grid == shapes.square else grid

    @cached_property
    def layout(self) -> VocabLayout:
        """Where the ids of each modality lie. Raises ValueError if the vocabulary cannot be laid out."""
        shapes = None if self.picture_shapes is None else self.picture_shapes.shapes
        return VocabLayout.of(self.vocabulary, shapes)

    def accumulation(self, world_size: int, step: int | None = None) -> int:
        """Number of micro-batches per rank in the step `step`, or after the ramp of the batch (None).

        Raises UserError if the batch of any step cannot be divided evenly.
        """
        context = self.parallel.context_ranks
        if world_size % context:
            raise UserError(f"parallel.context_ranks={context} does not divide the {world_size} ranks")
        rows = world_size // context  # this many groups of ranks hold different rows
        per_pass = self.training.micro_batch * rows
        for key, batch in self.training.batches.items():
            if batch % per_pass:
                shared = f" / parallel.context_ranks ({world_size} / {context})" if context > 1 else ""
                raise UserError(
                    f"{key} ({batch}) must be a multiple of training.micro_batch x ranks{shared} "
                    f"({self.training.micro_batch} x {rows} = {per_pass})"
                )
        return (self.training.batch if step is None else self.training.batch_at(step)) // per_pass

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values, preceded by the number of their schema. Runs and checkpoints keep this."""
        return {"schema": SCHEMA, **self.model_dump(mode="json")}

    def to_yaml(self) -> str:
        """The same as `to_dict`, as the text of a YAML file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)
