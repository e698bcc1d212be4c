"""The training loop: batch -> forward_backward -> agree -> step -> record -> maybe_checkpoint."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mom_data.batch import PackedBatch, first_sequences
from mom_data.dataset import TokenDataset, check_agreement
from mom_data.loader import Share, batches
from mom_data.plan import Plan, Source
from mom_tokenizers.vocab import VocabLayout
from mom_train.checkpoint import Checkpointer, TrainState, read_train_state
from mom_train.checkpoint_store import Checkpoint, Checkpoints
from mom_train.config import RunConfig, SourceConfig
from mom_train.convert import load_weights, open_weights
from mom_train.diffusion import NoisedPatches
from mom_train.ema import Ema
from mom_train.flops import training_flops_per_token
from mom_train.metrics import Clock, Record
from mom_train.model import LanguageModel, Losses, initialize
from mom_train.objective import Counts, drop_conditions, noised_patches, row_layout, with_latents_of
from mom_train.optimizer import build_optimizer, learning_rate
from mom_train.parallel import Ranks, agreed, process_group, shard

log = logging.getLogger(__name__)
_VALIDATION_NOISE = -1  # its own seed: validation sees the same noise in every run and at every step


class Stop:
    """A request to end, by signal; what every rank does about it is agreed at the next step. Ctrl-C twice ends at
    once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._request)

    def _request(self, number: int, _: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


class Trainer:
    """One run on one rank: model, optimiser, data, state."""

    def __init__(self, config: RunConfig, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.vocab = VocabLayout(config.vocabulary)
        self.modalities = self.vocab.modalities
        self.accumulation = agreed(lambda: config.accumulation(ranks.world_size))
        self.train_plan, self.validation_plans = agreed(lambda: build_plans(config))
        # resolved before anything keeps the config: a checkpoint must say what its model was trained on
        config = self.config = agreed(lambda: resolve_latents(config, self.train_plan, *self.validation_plans.values()))
        self.state = TrainState(
            tokens=dict.fromkeys(self.modalities, 0),
            data_fingerprint=self.train_plan.fingerprint,
            config=config.model_dump(mode="json"),
            version=importlib.metadata.version("mixture-of-mamba"),
        )
        checkpoints = agreed(lambda: Checkpoints(config.checkpoint.path or config.run_dir))
        self.checkpointer = Checkpointer(checkpoints, config.checkpoint)
        resume_from = self.checkpointer.newest()
        if resume_from is not None:
            agreed(lambda: self._carry_on(resume_from))
        with torch.device("meta"):
            model = LanguageModel(
                config.model,
                self.vocab.size,
                self._M,
                diffusion=config.objective.diffusion,
                z_loss=config.objective.z_loss,
                recompute=config.training.activation_checkpointing,
            )
        self.model = shard(model, ranks.mesh, compiled=config.training.compile)
        self.model.to_empty(device=ranks.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        if resume_from is None:
            initialize(self.model, config.seed)
            if (source := config.init_from) is not None:
                load_weights(self.model, agreed(lambda: open_weights(source)), source)
        decay = config.training.ema_decay
        self.ema = None if decay is None else Ema(self.model, decay)
        if resume_from is not None:
            self.checkpointer.load(resume_from, self.model, self.optimizer, self.ema)
        diffusion = config.objective.diffusion
        length = config.data.sequence_length
        self.flops_per_token = training_flops_per_token(config.model, self.vocab.size, length)
        self.flops_per_patch = training_flops_per_token(
            config.model, self.vocab.size, length, diffusion.patch_width if diffusion else 0
        )
        self.modality_of_id = torch.from_numpy(self.vocab.modality_of_id).to(ranks.device)
        self.read = self.damaged = 0
        self.time_to_save = False

    def _carry_on(self, path: Checkpoint) -> None:
        """From the state saved there. Raises ValueError where it is another model's or another order's."""
        saved = read_train_state(path)
        now = self.config.model_dump(mode="json")
        for section in ("model", "vocabulary", "objective"):
            # as text: the order of the vocabulary numbers the modalities
            if saved.config is not None and json.dumps(saved.config[section]) != json.dumps(now[section]):
                raise ValueError(
                    f"{path} was trained with {section}={saved.config[section]}, the config has {now[section]}. "
                    "Use another run_dir for another model."
                )
        if saved.data_fingerprint != self.train_plan.fingerprint:
            raise ValueError(
                f"{path} counts its data in plan {saved.data_fingerprint}, the config's is "
                f"{self.train_plan.fingerprint}: shards, weights, sequence_length, lanes, pack_window or seed changed. "
                "Restore them, or use another run_dir."
            )
        self.state.step, self.state.sequence = saved.step, saved.sequence
        self.state.tokens, self.state.flops = saved.tokens, saved.flops

    # ---- the run ------------------------------------------------------------------------------------------

    def run(self, stop: Stop) -> None:
        """Train from where the state is to `training.steps`, or to `training.stop_at`."""
        config, state = self.config, self.state
        last = min(config.training.stop_at or config.training.steps, config.training.steps)
        record = Record(config.run_dir, state.step, last) if self.ranks.main else None
        with record or nullcontext(), self.checkpointer:
            if state.step == 0 and self.validation_plans:
                values = self.validate()
                if record is not None:
                    record.write(0, values)
            stream, clock = self.stream(), Clock(sum(self._tokens.values()))
            while state.step < last:
                with clock.waiting():
                    step_batches = [self.prepared(b) for b in islice(stream, self.accumulation)]
                counts, tokens_M, stopping = self.agree(step_batches, stop)
                if stopping:
                    break
                sums = self.forward_backward(step_batches, counts)
                grad_norm = self.step()
                self.advance(step_batches, counts, tokens_M)

                validating = self.due(config.validation.every, last)
                saving = state.step == last or self.time_to_save or self.checkpointer.due(state.step)
                if validating or saving or self.due(config.log_every, last):
                    values = clock.lap(sum(self._tokens.values())) | self.values(sums, counts, grad_norm)
                    with clock.paused():
                        if validating:
                            values |= self.validate()
                        if record is not None:
                            record.write(state.step, values)
                        if saving:
                            self.save()
                if record is not None:
                    record.bar.update()
            self.checkpointer.wait()
            if self.checkpointer.committed_step != state.step:
                self.save()
                self.checkpointer.wait()
            if self.checkpointer.committed_step != state.step:
                raise ValueError(f"the state after step {state.step} could not be saved: see above")

    def stream(self) -> Iterator[PackedBatch]:
        config, ranks = self.config, self.ranks
        share = Share(ranks.rank, ranks.world_size, config.training.batch, config.training.micro_batch)
        return batches(
            self.train_plan,
            self.vocab,
            share,
            self.state.sequence,
            workers=config.data.workers,
            pin=ranks.device.type == "cuda",
            corrupt_share=config.data.corrupt_share,
        )

    def due(self, every: int | None, last: int) -> bool:
        return self.state.step == last or (every is not None and self.state.step % every == 0)

    @property
    def _tokens(self) -> dict[str, int]:
        assert self.state.tokens is not None
        return self.state.tokens

    def prepared(self, batch: PackedBatch) -> PackedBatch:
        diffusion = self.config.objective.diffusion
        if diffusion is None:
            return batch
        return drop_conditions(batch, self.config.seed, diffusion, self.vocab.specials["null"])

    # ---- one step -----------------------------------------------------------------------------------------

    def agree(self, step_batches: Sequence[PackedBatch], stop: Stop) -> tuple[Counts, Tensor, bool]:
        """What all ranks must know before a step: what the losses are divided by, the input tokens by modality (M,)
        int64 on the CPU, and whether any rank was asked to stop. Whether it is time for a checkpoint, and how the last
        one went, is agreed on in passing.

        Raises ValueError, on all ranks, when too many documents were damaged or too many checkpoints failed.
        """
        M = self._M
        local = torch.zeros(2 * M + 6, dtype=torch.int64)
        for batch in step_batches:
            local[:M] += self._targets(batch)
            local[M : 2 * M] += batch.real_tokens
            local[-4] += len(batch.latent_position)
            local[-3] += len(batch.damaged)
            local[-2] += batch.documents_read
            for name in batch.damaged:
                log.warning("masked %s: its bytes do not match their checksum", name)
        local[-6] = self.checkpointer.time_is_up
        local[-5] = self.checkpointer.finished
        local[-1] = stop.requested
        dist.all_reduce(local)
        self.time_to_save = bool(local[-6])
        if local[-5] == self.ranks.world_size:
            self.checkpointer.settle()
        self.damaged += int(local[-3])
        self.read += int(local[-2])
        allowed = self.config.data.max_bad_fraction * max(self.read, 1000)
        if self.damaged > allowed:
            raise ValueError(
                f"{self.damaged} of {self.read} documents did not match their checksums, more than "
                f"data.max_bad_fraction={self.config.data.max_bad_fraction} allows. Copy the shards again; the last "
                "checkpoint is intact."
            )
        positions = self.config.training.batch * self.config.data.sequence_length
        return Counts(local[:M], int(local[-4]), positions), local[M : 2 * M], bool(local[-1])

    def _targets(self, batch: PackedBatch) -> Tensor:
        """Targets of the cross-entropy by modality (M,) int64."""
        valid = batch.labels[batch.labels >= 0]
        return torch.bincount(torch.from_numpy(self.vocab.modality_of_id)[valid], minlength=self._M)

    def forward_backward(self, step_batches: Sequence[PackedBatch], counts: Counts) -> Tensor:
        """Accumulate the gradient of the mean loss over the step, whichever rank or micro-batch holds its targets.
        Returns this rank's sums (M+1,) float64: cross-entropy by modality of the target, squared error of patches."""
        self.model.train()
        sums = torch.zeros(self._M + 1, dtype=torch.float64, device=self.ranks.device)
        for i, batch in enumerate(step_batches):
            cast(FSDPModule, self.model).set_requires_gradient_sync(i == len(step_batches) - 1)
            losses, its_sums = self.loss(batch, self.config.seed)
            counts.objective(losses, self.config.objective).backward()
            sums += its_sums
        return sums

    def loss(self, batch: PackedBatch, noise_seed: int) -> tuple[Losses, Tensor]:
        """(the model's losses on one micro-batch, the sums that are logged (M+1,) float64)."""
        diffusion, device = self.config.objective.diffusion, self.ranks.device
        patches = None
        if diffusion is not None:
            patches = noised_patches(batch, noise_seed, diffusion)
            patches = NoisedPatches(*(t.to(device, non_blocking=True) for t in vars(patches).values()))
        batch = batch.to(device)
        layout = row_layout(batch, diffusion)
        labels_T = batch.labels.reshape(-1)[batch.rows]
        with self._autocast():
            losses = self.model(batch.tokens.reshape(-1)[batch.rows], layout, labels_T, patches)
        target_T = self.modality_of_id[labels_T.clamp_min(0)]
        sums = [torch.where(target_T == m, losses.tokens_T, 0.0).sum(dtype=torch.float64) for m in range(self._M)]
        return losses, torch.stack([*sums, losses.patches.detach().double()])

    @property
    def _M(self) -> int:
        return len(self.modalities)

    def _autocast(self) -> AbstractContextManager[None]:
        if self.config.training.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)

    def step(self) -> Tensor:
        """Clip, update, clear. Returns the norm of the whole gradient before clipping."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
        rate = learning_rate(self.state.step, self.config.training.steps, self.config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.checkpointer.staged()  # the last moment to copy what a checkpoint holds
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.state.step + 1)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def advance(self, step_batches: Sequence[PackedBatch], counts: Counts, tokens_M: Tensor) -> None:
        self.state.step += 1
        self.state.sequence = step_batches[-1].end_sequence
        for modality, n in zip(self.modalities, tokens_M.tolist(), strict=True):
            self._tokens[modality] += n
        discrete = int(tokens_M.sum()) - counts.patches
        self.state.flops += self.flops_per_token * discrete + self.flops_per_patch * counts.patches

    # ---- what is said and kept ----------------------------------------------------------------------------

    def values(self, sums: Tensor, counts: Counts, grad_norm: Tensor) -> dict[str, float]:
        """What is logged of a step."""
        return self.losses("", sums, counts) | {
            "grad_norm/total": grad_norm.item(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **{f"tokens/{m}": n for m, n in self._tokens.items()},
            "flops/total": self.state.flops,
            "data/damaged": self.damaged,
            "checkpoint/stall_s": self.checkpointer.stall,
        }

    def losses(self, prefix: str, sums: Tensor, counts: Counts) -> dict[str, float]:
        """Mean losses over all ranks: in total, and by modality of the target (cross-entropy in nats; for continuous
        pictures the squared error per channel). A modality without targets is left out."""
        sums = sums.clone()
        dist.all_reduce(sums)
        *entropy, squares = sums.tolist()
        targets = counts.targets_M.tolist()
        values = {m: s / n for m, s, n in zip(self.modalities, entropy, targets, strict=True) if n}
        total = sum(entropy) / max(1, sum(targets))
        diffusion = self.config.objective.diffusion
        if diffusion is not None and counts.patches:
            values["image"] = squares / (counts.patches * diffusion.patch_width)
            total += diffusion.weight * values["image"]
        return {f"{prefix}loss/total": total} | {f"{prefix}loss/{m}": v for m, v in values.items()}

    def validate(self) -> dict[str, float]:
        """Losses of the weights, or of their average where `validation.ema` asks for it."""
        with self.ema.applied() if self.ema is not None and self.config.validation.ema else nullcontext():
            return self._validate()

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Losses on the first `validation.sequences` sequences of each set: the same ones, with the same noise, at any
        world size, and as many passes on every rank."""
        self.model.eval()
        values: dict[str, float] = {}
        micro_batch, world = self.config.training.micro_batch, self.ranks.world_size
        wanted = self.config.validation.sequences
        for name, plan in self.validation_plans.items():
            share = Share(self.ranks.rank, world, micro_batch * world, micro_batch)
            sums = torch.zeros(self._M + 1, dtype=torch.float64, device=self.ranks.device)
            counts = torch.zeros(self._M + 1, dtype=torch.int64)
            stream = batches(plan, self.vocab, share, corrupt_share=self.config.data.corrupt_share)
            for batch in islice(stream, -(-wanted // (micro_batch * world))):
                batch = first_sequences(batch, wanted)
                counts[:-1] += self._targets(batch)
                counts[-1] += len(batch.latent_position)
                sums += self.loss(batch, _VALIDATION_NOISE)[1]
            dist.all_reduce(counts)
            values |= self.losses(
                f"val/{name}/", sums, Counts(counts[:-1], int(counts[-1]), wanted * self.config.data.sequence_length)
            )
        return values

    def save(self) -> None:
        """Begin a checkpoint. The seconds that training stood still for it are logged with the next step."""
        self.checkpointer.save(self.model, self.optimizer, self.ema, self.state)


def build_plans(config: RunConfig) -> tuple[Plan, dict[str, Plan]]:
    """The training order and the validation sets' orders, checked against each other and the run's tokenizers."""
    made_by = None
    if config.tokenizers is not None:
        from mom_tokenizers.bundle import Tokenizers

        made_by = Tokenizers.load(config.tokenizers).describe()
    opened: dict[tuple[str, str], TokenDataset] = {}
    cache, cache_bytes = config.data.cache, int(config.data.cache_gib * 2**30)

    def sources(entries: Sequence[SourceConfig]) -> Iterator[Source]:
        for entry in entries:
            key = (entry.path, entry.shards)
            if key not in opened:
                opened[key] = TokenDataset(entry.path, entry.shards, cache, cache_bytes)
            yield Source(opened[key], entry.weight)

    data = config.data
    train = Plan(tuple(sources(data.train)), data.sequence_length, data.lanes, data.pack_window, config.seed)
    validation = {
        name: Plan(tuple(sources(entries)), data.sequence_length, 1, data.pack_window, 0)
        for name, entries in data.validation.items()
    }
    check_agreement(list(opened.values()), config.vocabulary, made_by)
    return train, validation


def resolve_latents(config: RunConfig, *plans: Plan) -> RunConfig:
    """The config with the scale and shift of the plans' latents. Raises ValueError as `with_latents_of`."""
    datasets = [source.dataset for plan in plans for source in plan.sources]
    diffusion = with_latents_of(config.objective.diffusion, datasets)
    return config.model_copy(update={"objective": config.objective.model_copy(update={"diffusion": diffusion})})


def train(config: RunConfig) -> None:
    """Run `config` to its end, from its latest checkpoint where it has one."""
    with process_group() as ranks:
        stop = Stop()
        trainer = Trainer(config, ranks)
        if ranks.main:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            (config.run_dir / "config.yaml").write_text(trainer.config.to_yaml())
            trainer.vocab.save(config.run_dir / "vocab.json")
            total = sum(p.numel() for p in trainer.model.parameters())
            log.info(
                "%s: %.2f M parameters, %d ranks on %s, from step %d of %d",
                config.run_dir,
                total / 1e6,
                ranks.world_size,
                ranks.device.type,
                trainer.state.step,
                config.training.steps,
            )
        trainer.run(stop)
