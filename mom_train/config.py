"""A run, described: every section and key with its type, default and meaning. Impossible values are errors."""

from __future__ import annotations

import difflib
import os
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mom_tokenizers.errors import UserError
from mom_tokenizers.vocab import VocabLayout
from mom_train.migrations import SCHEMA

Part = Literal["in_proj", "x_proj", "dt_proj", "out_proj", "attention", "feed_forward", "norm"]
Recompute = bool | Literal["selective"]
PROJECTIONS: tuple[Part, ...] = ("in_proj", "x_proj", "dt_proj", "out_proj")
"""What the paper decouples: Mixture-of-Mamba is Mamba with all four of them by modality."""
PATH_KEYS = ("path", "raw")
"""Keys whose text names a place: a path, a URL, and in `raw` a glob as well. So does every value of type Path."""
_PARTS: dict[str, tuple[Part, ...]] = {
    "mamba": (*PROJECTIONS, "norm"),
    "transformer": ("attention", "feed_forward", "norm"),
}


_ONLY: dict[str, tuple[str, ...]] = {
    "mamba": ("state", "conv", "expand", "dt_rank"),
    "transformer": ("heads", "rope_base"),
}
_YEAR = 365 * 24 * 3600.0
QUARTERS = 4
"""Parts that a validation divides the timesteps of diffusion into: t0 has the least noise, t3 the most."""
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Numbers are finite everywhere, and each has the bounds outside of which nothing could come of it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        validate_default=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic reads true as 1, and an empty path as the working directory; nobody means that."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {annotation, *get_args(annotation)}
        within = value if isinstance(value, list | tuple) else [value]
        if isinstance(value, dict) and any(get_origin(kind) is dict for kind in kinds):  # not a section's
            within = list(value.values())
        if bool not in kinds and any(isinstance(v, bool) for v in within):
            raise UserError("true and false are no value of this key")
        if Path in kinds and value == "":
            raise UserError("the path is empty")
        if (
            Path in kinds or str(info.field_name) in PATH_KEYS
        ):  # a shell expands ~ at the start of a word only, and YAML never
            if isinstance(value, list | tuple):
                return [os.path.expanduser(v) if isinstance(v, str) else v for v in value]
            return os.path.expanduser(value) if isinstance(value, str) else value
        return value


class ModelConfig(Section):
    architecture: Literal["mamba", "transformer"] = "mamba"
    """Which block: Mamba-1, or attention (RoPE) with a SwiGLU feed-forward."""
    dim: PositiveInt
    """Width of the residual stream. Mamba's inner width is `expand` times this."""
    layers: PositiveInt
    """A layer is two Mamba blocks, as in the published model, or one Transformer block."""
    decoupled: tuple[Part, ...]
    """Parts with weights of their own for each modality. Mixture-of-Mamba: all four *_proj; dense: []. Transformer:
    attention, feed_forward and norm together make the Mixture-of-Transformers. `norm` gives Mamba per-modality norms
    as well."""
    router: Literal["rule", "learned"] = "rule"
    """Who chooses a decoupled projection's matrix: the token's modality, or a learned top-1 router per projection."""
    experts: PositiveInt = 1
    """Matrices per modality. More than one makes a mixture of experts inside each modality (`rule`), or a larger pool
    (`learned`)."""
    heads: PositiveInt | None = None
    """Attention heads (Transformer only); must divide `dim`."""
    rope_base: float = Field(default=10000.0, gt=1)
    """Base of the rotary position embedding (Transformer only)."""
    state: PositiveInt = 16
    """N, the size of each channel's state."""
    conv: PositiveInt = 4
    """Taps of the causal convolution."""
    expand: PositiveInt = 2
    """Inner width over `dim`."""
    dt_rank: PositiveInt | None = None
    """Rank of the time-step projection; ceil(dim / 16) by default."""
    norm_eps: float = Field(default=1e-5, gt=0, lt=1)
    """Added to the mean square in RMSNorm."""
    identical_modalities: bool = False
    """Start every modality from the same weights instead of independent draws."""

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        known = _PARTS[self.architecture]
        for part in self.decoupled:
            if part not in known:
                raise UserError(f"a {self.architecture} has no part '{part}' to decouple; it has {', '.join(known)}")
            if self.decoupled.count(part) > 1:
                raise UserError(f"decoupled names '{part}' twice")
        if (self.router != "rule" or self.experts > 1) and not {*self.decoupled} - {"norm"}:
            raise UserError(
                f"router={self.router}, experts={self.experts}: there is nothing to choose between, for no part but "
                "norms is decoupled; name parts in model.decoupled, or leave router and experts out"
            )
        if self.architecture == "transformer" and (self.heads is None or self.dim % (2 * self.heads)):
            raise UserError(f"a transformer needs heads such that dim / heads is even (dim {self.dim})")
        [other] = {*_ONLY} - {self.architecture}
        for key in _ONLY[other]:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise UserError(f"{key}: only a {other} has it, and this is a {self.architecture}")
        return self

    @property
    def blocks(self) -> int:
        return self.layers if self.architecture == "transformer" else 2 * self.layers

    @property
    def feed_forward(self) -> int:
        """Hidden width of the SwiGLU feed-forward: 8/3 of `dim`, rounded up to a multiple of 256."""
        return -(-8 * self.dim // (3 * 256)) * 256

    @property
    def inner(self) -> int:
        return self.expand * self.dim

    @property
    def rank(self) -> int:
        return self.dt_rank or -(-self.dim // 16)


class DiffusionConfig(Section):
    """The image loss of Transfusion: denoising of latent patches (DDPM)."""

    patch_width: PositiveInt
    """Values of a patch: latent channels x patch side squared, as the shards' `latent_width`."""
    weight: float = Field(5.0, ge=0)
    """Lambda in LM + lambda * DDPM. 5 is recovered from Table 4: (overall - text) / image in all nine rows."""
    steps: PositiveInt = 1000
    """T, diffusion steps of the cosine schedule."""
    prediction: Literal["epsilon", "v", "flow"] = "epsilon"
    """What the model predicts: the noise (the paper), v, or the velocity of a rectified flow."""
    noise_limit: PositiveInt | None = None
    """Largest timestep (exclusive) for a picture that precedes text in its document; null, as the paper is silent."""
    condition_dropout: float = Field(0.0, ge=0, le=1)
    """Share of pictures whose preceding text and codes are replaced by <null>, for classifier-free guidance. Special
    tokens and earlier pictures stay."""
    latent_scale: float | None = Field(None, gt=0)
    """Latents are multiplied by this (a VAE's scaling_factor); null takes the shards', which is 1 where they record
    none."""
    latent_shift: float | None = None
    """Subtracted from the latents before scaling; null takes the shards', which is 0 where they record none."""

    @model_validator(mode="after")
    def _fits(self) -> DiffusionConfig:
        if self.steps < QUARTERS:
            raise UserError(f"steps={self.steps}: at least {QUARTERS}, for losses are told by quarter of the timesteps")
        if self.noise_limit is not None and self.noise_limit > self.steps:
            raise UserError(f"noise_limit={self.noise_limit} is above steps={self.steps}, so it limits nothing")
        return self


class ObjectiveConfig(Section):
    load_balance: float = Field(default=0.01, ge=0)
    """Weight of the routers' load-balance loss, where there are routers."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-normaliser of the softmax, averaged over targets."""
    diffusion: DiffusionConfig | None = None
    """Continuous pictures (Transfusion). Without it every modality is discrete (Chameleon)."""


class SourceConfig(Section):
    path: Name | None = None
    """A folder of token shards, as tools/tokenize_shards.py writes it (holds manifest.json): here, or at http(s)://,
    s3:// or another URL that fsspec knows."""
    raw: tuple[Name, ...] = ()
    """Instead of `path`: raw documents (files, folders, globs), tokenized by the run's `tokenizers` as they are first
    wanted, into data.cache. To try a corpus out; what is trained on for long is better tokenized once."""
    split: Literal["train", "val"] | None = None
    """Of `raw`: one side of a hold-out of documents by their keys, as tokenize_shards --split."""
    holdout: float = Field(default=0.03, ge=0, le=1)
    """Share of documents that is `val`."""
    weight: float = Field(1.0, gt=0)
    """Share of the tokens drawn from this source, relative to the other sources' weights."""
    shards: Name = "*"
    """Only the shards whose name matches this glob."""

    @model_validator(mode="after")
    def _one_place(self) -> SourceConfig:
        if (self.path is None) == (not self.raw):
            raise UserError("say where it is: either `path`, token shards, or `raw`, documents to tokenize online")
        if self.split is not None and not self.raw:
            raise UserError("split: only of `raw` documents; token shards were divided when they were made")
        if self.split is not None and not 0 < self.holdout < 1:
            raise UserError(f"holdout={self.holdout} leaves one side of the split empty: above 0 and below 1")
        return self


class DataConfig(Section):
    train: tuple[SourceConfig, ...]
    """What to train on."""
    validation: dict[str, tuple[SourceConfig, ...]] = {}
    """Named validation sets: losses are logged as val/<name>/loss/<modality>."""
    sequence_length: int = Field(ge=2)
    """L, positions in a packed row."""
    lanes: PositiveInt = 16
    """Lanes that the order is dealt from: sequence i is the next one of lane i mod lanes. Part of the order: do not
    change it mid-run."""
    pack_window: PositiveInt = 2048
    """Pieces of documents packed together. Part of the order, as the next three are."""
    packing: Literal["best_fit", "concatenate"] = "best_fit"
    """How: best fit first, text split to fill gaps; or one after another, cut where a row ends."""
    cut_spans: bool = False
    """Whether codes of a picture and units of speech may be cut between rows. Latents never are."""
    shuffle_units: PositiveInt = 16
    """Shards, or parts of them, whose documents a lane shuffles together."""
    new_phase: bool = False
    """Carry a run on with other sources, weights or packing than its checkpoint's: from there on the new ones hold,
    every source goes on from where it was, and the checkpoint keeps the list of phases."""
    workers: int = Field(1, ge=0)
    """Loader processes per rank; 0 reads in the training process. Not part of the order."""
    cache: Path | None = None
    """Node-local folder for shards of remote sources, shared by the node's processes; by default
    $TMPDIR/mom-cache-UID."""
    cache_gib: float = Field(32.0, gt=0)
    """Most GiB the cache may hold. At least room for the shards that a node reads at a time and those it fetches ahead
    (2 x lanes of its ranks x sources), or they are fetched again and again."""
    corrupt_share: float = Field(default=0.0, ge=0, le=1)
    """Share of tokens routed as another modality than their own, in training and validation: an experiment on how
    much the modality mask matters."""
    max_bad_fraction: float = Field(1e-3, ge=0, le=1)
    """Documents of token shards that fail their checksum are masked and counted; past this share of those read, the run
    stops."""
    max_unreadable_fraction: float = Field(0.05, ge=0, le=1)
    """Documents of `raw` that cannot be read are left out and counted; past this share of those read, the run stops.
    One that is empty, or too large, is left out too, and does not count here."""


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
