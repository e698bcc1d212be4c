"""The training loop: read batches, agree with the other ranks, forward and backward, update, record, checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mom_data.batches.batch import PackedBatch
from mom_data.batches.loader import batches
from mom_tokenizers.errors import EXIT_INCIDENT, EXIT_PREEMPTED, AgreedError, user_path
from mom_train.agreement import Agreement, DocumentAccount, StepCount, largest_over_all_ranks
from mom_train.anomaly import BadSteps, Judge
from mom_train.checkpoint.branch import adopt
from mom_train.checkpoint.saver import Checkpointer, TrainState, read_to_continue, read_train_state
from mom_train.checkpoint.store import Checkpoint, Checkpoints, with_absolute_place
from mom_train.config.run import RunConfig
from mom_train.cost.flops import training_flops
from mom_train.data import RunData, newest, open_data, planned_as_now
from mom_train.distributed.context import Context
from mom_train.distributed.flight_recorder import record_nccl
from mom_train.distributed.ranks import Ranks, agreed, first_failure, model_mesh, process_group, set_timeout
from mom_train.distributed.run_lock import RunLock
from mom_train.distributed.status import RunState, Stop, write_status
from mom_train.distributed.watch import Watch
from mom_train.exchange.weights import fill, match, open_weights
from mom_train.generate.samples import TrainingSampler
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel, build_model, set_precision
from mom_train.model.objective import Counts
from mom_train.model.sharding import compile_blocks, shard
from mom_train.model.step_graph import check_device
from mom_train.observe.environment import environment, write_environment
from mom_train.observe.instruments import Instruments
from mom_train.observe.metrics import Clock, Record
from mom_train.observe.timeline import Timeline
from mom_train.observe.wandb import check_wandb
from mom_train.optim.ema import Ema
from mom_train.optim.gradients import Clipping
from mom_train.optim.optimizer import build_optimizer, set_rate
from mom_train.optim.schedule import rate_of_step
from mom_train.passes import Passes
from mom_train.resume import compare_with_checkpoint
from mom_train.validation.evaluations import Evaluations
from mom_train.validation.losses import validate

log = logging.getLogger(__name__)


class Trainer:
    """A run on one rank. It holds the model, the optimiser, the data and the state, and has the loop that changes
    them."""

    ema: Ema | None = None
    """The average of the weights, where one is kept."""
    stepped = False
    """Whether this process has done a step; the first one may take longer than the others."""
    rate = 0.0
    """The learning rate of the last step, before the factors of parameter groups."""

    def __init__(self, config: RunConfig, ranks: Ranks):
        """Prepares the run: every rank is to call this. Raises AgreedError, on all ranks alike, for what a user can
        mend."""
        self.ranks, self.vocab, self.modalities = ranks, config.layout, config.layout.modalities
        agreed(lambda: config.accumulation(ranks.world_size))
        agreed(lambda: check_wandb(config))
        self.sampler = None if config.sampling.every is None else agreed(lambda: TrainingSampler(config, ranks))
        self.checkpointer, start, saved = _open_checkpoints(config)
        # resolved before anything keeps the config: a checkpoint must say what its model was trained on
        data = agreed(lambda: open_data(config, saved, say=ranks.main))
        self.config, self.plan, self.validation_plans = data.config, data.plan, data.validation_plans
        self.text_bytes = data.text_bytes
        if start is not None:
            agreed(lambda: compare_with_checkpoint(self.config, saved, start))
        self.state = TrainState.begin(self.config, self.plan.fingerprint, data.phases)
        self.model = _sharded_model(self.config, ranks)
        self.optimizer = build_optimizer(self.model, self.config.optimizer)
        parallel = self.config.parallel
        copies = ranks.world_size // (parallel.shard_ranks or ranks.world_size)
        one_pass = ranks.device.type == "cuda" and not parallel.cpu_offload
        self.clipping = Clipping(self.model, self.modalities, self.config.optimizer.clip, copies, one_pass)
        self.context = Context.of(ranks, self.config.parallel.context_ranks)
        self.passes = Passes(self.config, self.vocab, ranks, self.model, self.context)
        self.evaluations = None if config.evaluation.every is None else agreed(lambda: self._evaluations(data))
        self.judge = Judge(self.config.anomaly, ranks.device)
        self.bad_steps = BadSteps(self.config, self.plan, ranks)
        self.documents = DocumentAccount(self.config.data)
        self._fill_weights(start)
        self.watch = agreed(lambda: Watch(self.config.run_dir, ranks.rank))
        self.instruments = Instruments(self.config, ranks, self.model)
        self.timeline = agreed(lambda: Timeline(self.config.run_dir if ranks.main else None, self.state.step))

    def _evaluations(self, data: RunData) -> Evaluations:
        """Finds the documents that are evaluated, and logs what is left out."""
        sets = {name: [s.dataset for s in plan.sources] for name, plan in data.validation_plans.items()}
        found = Evaluations(self.config.evaluation, self.passes, sets, data.minimal_pairs)
        if self.ranks.main:
            for note in found.notes:
                log.warning("evaluation: %s", note)
        return found

    def _fill_weights(self, start: Checkpoint | None) -> None:
        """Gives the model its initial values, or those of init_from, or those of a checkpoint, and begins their
        average."""
        config = self.config
        if start is None:
            self.checkpointer.restore_best({})
            initialize(self.model, config.seed)
            if (source := config.init_from) is not None:
                weights = agreed(lambda: open_weights(source))
                fill(self.model, agreed(lambda: match(self.model, weights, source, self.vocab)))
        if config.training.ema_decay is not None:
            self.ema = Ema(self.model, config.training.ema_decay)
        if start is not None:
            self._load(start)

    def _load(self, checkpoint: Checkpoint) -> None:
        """Restores model, optimiser and state from a checkpoint. The data continues after what a rollback left out."""
        saved = agreed(lambda: read_train_state(checkpoint))
        self.checkpointer.load(checkpoint, self.model, self.optimizer, self.ema)
        state = self.state
        state.step, state.tokens, state.flops = saved.step, saved.tokens, saved.flops
        state.sequence, state.lanes = saved.sequence, saved.lanes if planned_as_now(saved.phases) else {}
        state.validated = saved.validated
        self.checkpointer.restore_best(saved.best)
        if saved.judge:
            self.judge.load_state_dict(saved.judge)
        state.sequence = agreed(lambda: self.bad_steps.behind(saved.step, saved.sequence))

    # ---- the run ------------------------------------------------------------------------------------------

    def run(self, stop: Stop) -> tuple[RunState, str]:
        """Trains from the present step to `training.steps` or `training.stop_at`. Where steps stay bad, it goes back
        to a checkpoint and leaves the data of those steps out. Returns how the run ended, and why."""
        with closing(self.timeline), self.instruments, self.checkpointer, self.watch:
            self.watch.begin(self.config.parallel.first_step_timeout)
            self.instruments.measure()
            dry_run = self.config.parallel.dry_run
            if dry_run or (dry_run is None and self.ranks.device.type == "cuda"):
                log.info("a full batch takes %.1f GiB at most", self.passes.dry_run(self.optimizer))
            while (outcome := self._train(stop)) is None:
                if (checkpoint := self.bad_steps.roll_back(self.checkpointer, self.state.sequence)) is None:
                    return "failed", "steps stay bad: see incident.json"
                self.timeline.back_to(checkpoint.step)
                self._load(checkpoint)
            return outcome

    def _train(self, stop: Stop) -> tuple[RunState, str] | None:
        """Runs the loop. Returns how it ended, or None where steps stay bad."""
        config, state = self.config, self.state
        last = min(config.training.stop_at or config.training.steps, config.training.steps)
        record = agreed(lambda: Record(config, self.state.step, last) if self.ranks.main else None)
        with record or nullcontext():
            self._validate_before(record, stop, last)
            stream, clock = self.stream(), Clock(sum(self._tokens.values()))
            self.instruments.speed.restart(self.state.flops)
            outcome: tuple[RunState, str] = ("finished" if last == config.training.steps else "stopped", "")
            while state.step < last:
                self.timeline.enter("data")
                with clock.waiting():
                    step_batches = [self.passes.prepared(b) for b in islice(stream, self.accumulation)]
                self.timeline.train()
                agreement = self.agree(step_batches, stop)
                if agreement.stop:
                    outcome = "preempted", stop.reason(agreement.stop)
                    log.warning("%s: checkpoint and end after step %d", outcome[1], state.step)
                    break
                self.instruments.begin(state.step + 1, agreement.profile, agreement.snapshot)
                sums = self.passes.forward_backward(step_batches, agreement.counts)
                if self._stay_bad():
                    self.optimizer.zero_grad()
                    return None
                logged = self.due(config.log_every, state.step + 1, last)
                all_sums, norms = self.step(sums, agreement.counts, step_batches, detailed=logged)
                self.advance(step_batches, agreement)

                validating = self.due(config.validation.every, state.step, last)
                saving = state.step == last or agreement.save or self.checkpointer.due(state.step)
                recording = validating or saving or logged
                values = self.lap(clock, all_sums, agreement.counts, norms) if recording else {}
                self.timeline.trained(state.step)
                self.instruments.end(state.step)
                if recording:
                    values |= self.timeline.figures()
                    with clock.paused():
                        if validating:
                            values |= (validated := self.validate(stop))
                            saving |= self.checkpointer.improves(state.step, validated)
                        if record is not None:
                            record.write(state.step, values)
                        if saving:
                            self.save()
                if self.sampler is not None and self.due(config.sampling.every, state.step, last):
                    with clock.paused():
                        self.sample(self.sampler, record, stop)
                if record is not None:
                    record.bar.update()
            self._stay_bad()  # the last step's verdict, too, is said
            self._save_the_end()
        return outcome

    def _stay_bad(self) -> bool:
        """Looks at the verdict on the last step. Returns whether too many steps in a row have been bad."""
        stay_bad = self.bad_steps.stay_bad()
        if self.bad_steps.last_was_bad:
            self.timeline.skipped()
        return stay_bad

    def _save_the_end(self) -> None:
        with self.timeline.during("checkpoints"):
            self.checkpointer.wait()
            if self.checkpointer.committed_step != self.state.step:
                self.save()
                self.checkpointer.wait()
        if self.checkpointer.committed_step != self.state.step:
            raise AgreedError(f"the state after step {self.state.step} could not be saved: see above")

    def stream(self) -> Iterator[PackedBatch]:
        config, ranks = self.config, self.ranks
        training = config.training
        share = self.context.share(training.batch, training.micro_batch, training.ramp_from(self.state.step))
        return batches(
            self.plan,
            self.vocab,
            share,
            self.state.sequence,
            {int(lane): cursor for lane, cursor in self.state.lanes.items()},
            workers=config.data.workers,
            pin=ranks.device.type == "cuda",
            corrupt_share=config.data.corrupt_share,
        )

    @property
    def accumulation(self) -> int:
        """Number of micro-batches of this rank in the present step."""
        return self.config.accumulation(self.ranks.world_size, self.state.step)

    @staticmethod
    def due(every: int | None, step: int, last: int) -> bool:
        return step == last or (every is not None and step % every == 0)

    @property
    def _tokens(self) -> dict[str, int]:
        assert self.state.tokens is not None
        return self.state.tokens

    # ---- one step -----------------------------------------------------------------------------------------

    def agree(self, step_batches: Sequence[PackedBatch], stop: Stop) -> Agreement:
        """Counts the step over all ranks, and agrees on whether to stop, whether to save, and how the last save went.

        Raises AgreedError, on all ranks, when too many documents were damaged or too many checkpoints failed.
        """
        mine = StepCount.empty(len(self.modalities))
        if self.context.rank == 0:  # a row's first rank counts for all that share it
            for batch in step_batches:
                mine.add(batch, self.passes.targets(batch))
            self.documents.name_what_is_wrong(step_batches)
        mine.wants_to_save = int(self.checkpointer.time_is_up)
        mine.saves_finished = int(self.checkpointer.finished)
        mine.wants_to_stop = int(stop.code != 0)
        asked = self.instruments.requests()
        mine.wants_profile, mine.wants_snapshot = int(asked["profile"]), int(asked["memory"])
        with self.watch.waiting():
            count = mine.over_all_ranks()
        if count.saves_finished == self.ranks.world_size:
            self.checkpointer.settle()
        self.documents.add(count)
        positions = self.config.training.batch_at(self.state.step) * self.config.data.sequence_length
        counts = Counts(count.targets_M, count.patches, positions)
        reason_to_stop = largest_over_all_ranks(stop.code) if count.wants_to_stop else 0
        flags = [bool(n) for n in (count.wants_to_save, count.wants_profile, count.wants_snapshot)]
        return Agreement(counts, count.tokens_M, reason_to_stop, *flags)

    def step(
        self, sums: Tensor, counts: Counts, step_batches: Sequence[PackedBatch], detailed: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Clips the gradient, updates the weights unless the step is bad, and clears the gradient.

        Returns the sums of all ranks (S,), and norms of the gradient before
        clipping: in total, and where `detailed` by kind of projection and by modality.

        Whether it is bad is decided on the device from values that all ranks share; the host learns it a step later.
        """
        all_sums, norms = self.clipping(sums, self.optimizer, detailed)
        norm = norms["total"]
        bad = self.judge.bad(self.passes.total(all_sums, counts), norm.to(sums.device))
        self.bad_steps.note(self.state.step + 1, bad, sums, step_batches)
        self.rate = rate_of_step(self.state.step, self.config.training, self.config.optimizer)
        set_rate(self.optimizer, self.rate)
        self.checkpointer.staged()  # the last moment to copy what a checkpoint holds
        self.optimizer.found_inf = bad.to(norm.device, torch.float32)  # type: ignore[attr-defined]  # fused AdamW's
        with self.instruments.update():
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.state.step + 1)
        return all_sums, norms

    def advance(self, step_batches: Sequence[PackedBatch], agreement: Agreement) -> None:
        state = self.state
        state.step += 1
        state.sequence = step_batches[-1].end_sequence
        for batch in step_batches:
            state.lanes |= {str(lane): cursor for lane, cursor in batch.cursors.items()}
        for modality, n in zip(self.modalities, agreement.tokens_M.tolist(), strict=True):
            self._tokens[modality] += n
        patches = agreement.counts.patches
        discrete = int(agreement.tokens_M.sum()) - patches
        state.flops += training_flops(self.config, discrete, patches)
        if not self.stepped:
            self.stepped = True
            set_timeout(self.config.parallel.timeout)
        self.watch.begin(self.config.parallel.timeout)

    # ---- what is said and kept ----------------------------------------------------------------------------

    def lap(self, clock: Clock, sums: Tensor, counts: Counts, norms: dict[str, Tensor]) -> dict[str, float]:
        """The figures of a step that are logged, with the speed since the last ones. Collective."""
        values = clock.lap(sum(self._tokens.values()))
        values |= self.instruments.figures(self.state.flops, clock.seconds)
        return values | self.watch.report(clock.seconds) | self.values(sums, counts, norms)

    def values(self, sums: Tensor, counts: Counts, norms: dict[str, Tensor]) -> dict[str, float]:
        """The figures of a step that are logged."""
        norm_values = torch.stack([norm.double() for norm in norms.values()]).tolist()
        return self.passes.means("", sums, counts) | {
            **{f"grad_norm/{part}": norm for part, norm in zip(norms, norm_values, strict=True)},
            "learning_rate": self.rate,
            **(
                {"batch": self.config.training.batch_at(self.state.step - 1)} if self.config.training.batch_ramp else {}
            ),
            **{f"tokens/{m}": n for m, n in self._tokens.items()},
            "flops/total": self.state.flops,
            **self.documents.figures(),
            "checkpoint/stall_s": self.checkpointer.stall,
            "anomaly/skipped": int(self.judge.skipped),
        }

    def evaluated(self) -> AbstractContextManager[None]:
        """Within this context the model computes with the average of its weights, where `validation.ema` is set."""
        return self.ema.applied() if self.ema is not None and self.config.validation.ema else nullcontext()

    def validate(self, stop: Stop) -> dict[str, float]:
        """Computes the losses on the validation sets, and where they are due the evaluations. Returns nothing where a
        rank is asked to end meanwhile."""

        def interrupted() -> bool:
            return bool(largest_over_all_ranks(stop.code))

        with self.timeline.during("validation"), self.evaluated():
            values = validate(self.passes, self.validation_plans, self.text_bytes, interrupted)
            if values and self.evaluations is not None and self._evaluation_due:
                more = self.evaluations.logged(interrupted)
                values = {} if more is None else values | more
        if values:
            self.state.validated = self.state.step
        return values

    @property
    def _evaluation_due(self) -> bool:
        training, every = self.config.training, self.config.evaluation.every
        assert every is not None
        between = (self.config.validation.every or training.steps) * every
        return self.due(between, self.state.step, min(training.stop_at or training.steps, training.steps))

    def _validate_before(self, record: Record | None, stop: Stop, last: int) -> None:
        """Validates before the first step. In a resumed run, it makes up for a validation that was due at this step and
        that a request to end cut short."""
        step = self.state.step
        if self.state.validated == step or not (step == 0 or self.due(self.config.validation.every, step, last)):
            return
        values = self.validate(stop)
        if step and self.checkpointer.improves(step, values):
            self.checkpointer.mark_best()
        if record is not None and values:
            record.write(step, {"flops/total": self.state.flops, **values})

    def sample(self, sampler: TrainingSampler, record: Record | None, stop: Stop) -> None:
        with self.timeline.during("samples"), self.evaluated():
            documents = sampler.sample(self.model, self.state.step, lambda: stop.code != 0)
        if record is not None:
            record.samples(self.state.step, documents)

    def save(self) -> None:
        """Begins to write a checkpoint. The seconds that training waited for it are logged with the next step."""
        with self.timeline.during("checkpoints"):
            known: list[dict[str, Any]] = [{}] * self.ranks.world_size
            dist.all_gather_object(known, self.state.lanes)
            self.state.lanes = newest(*known)
            self.state.judge = self.judge.state_dict()
            self.checkpointer.save(self.model, self.optimizer, self.ema, self.state)
        self.timeline.save()


def _open_checkpoints(config: RunConfig) -> tuple[Checkpointer, Checkpoint | None, TrainState]:
    """Returns the run's checkpoints, the one that it continues from, and the state saved there. Collective."""
    checkpoints = agreed(lambda: Checkpoints(config.checkpoint.path or config.run_dir))
    checkpointer = Checkpointer(checkpoints, config.checkpoint)
    if (start := checkpointer.newest()) is None:
        agreed(lambda: checkpoints.check_begins_anew(config))
        if (branch := config.branch) is None:
            return checkpointer, None, TrainState()
        agreed(lambda: adopt(branch, checkpoints) if dist.get_rank() == 0 else None)
        start = checkpointer.newest()
        assert start is not None
    return checkpointer, start, agreed(lambda: read_to_continue(start))


def _sharded_model(config: RunConfig, ranks: Ranks) -> LanguageModel:
    """Builds the model of the config, sharded over the ranks, or whole on one with training.cuda_graph. Its weights
    have memory but no values. Collective."""
    mesh = agreed(lambda: model_mesh(ranks, config.parallel.shard_ranks))
    model = build_model(config)
    agreed(lambda: set_precision(model, config, ranks.device))
    if config.training.cuda_graph:  # on one rank, where nothing has to be gathered
        agreed(lambda: check_device(ranks))
        compile_blocks(model, config.training.compile)
    else:
        model = shard(
            model, mesh, config.training.compile, config.parallel.cpu_offload, config.training.precision != "fp32"
        )
    model.to_empty(device="cpu" if config.parallel.cpu_offload else ranks.device)
    return model


def _begin(trainer: Trainer, machines: Sequence[Any]) -> None:
    """Logs what begins, and writes the files that describe it into RUN. Raises UserError where that is impossible."""
    config, ranks, step = trainer.config, trainer.ranks, trainer.state.step
    with user_path(config.run_dir):
        write_environment(config.run_dir, machines, ranks, step)
        (config.run_dir / "config.yaml").write_text(with_absolute_place(config).to_yaml())
        trainer.vocab.save(config.run_dir / "vocab.json")
        write_status(config.run_dir, "running", step, config.training.steps)
    log.info(
        "%s: %.2f M parameters, %d ranks on %s, from step %d of %d",
        config.run_dir,
        sum(p.numel() for p in trainer.model.parameters()) / 1e6,
        ranks.world_size,
        ranks.device.type,
        step,
        config.training.steps,
    )
    for key, limit in (("steps", config.training.steps), ("stop_at", config.training.stop_at)):
        if limit is not None and step >= limit:
            log.info("nothing is left to train: training.%s=%d is reached. Raise it to train on.", key, limit)
            break


def _end(config: RunConfig, outcome: RunState, step: int, reason: str) -> None:
    """Logs how the run ended, and writes it to status.json where that is possible."""
    steps = config.training.steps
    log.info("%s: %s at step %d of %d%s", config.run_dir, outcome, step, steps, f": {reason}" if reason else "")
    try:
        write_status(config.run_dir, outcome, step, steps, reason)
    except OSError as error:
        path = config.run_dir / "status.json"
        log.error("%s CANNOT BE WRITTEN and may still say that the run goes on: %s", path, error)


def train(config: RunConfig) -> int:
    """Runs `config` to its end, from its latest checkpoint where it has one, and returns the exit code.

    0: finished, or stopped at training.stop_at. 75: it was asked to end before; under torchrun this is 0 as well,
    because torchrun would start the run again at once. 3: steps stayed bad.
    """
    stop = Stop(config.training.time_limit)
    record_nccl(config.run_dir)
    with (
        process_group(config.parallel.first_step_timeout) as ranks,
        agreed(lambda: RunLock(config.run_dir) if ranks.main else nullcontext()),
    ):
        trainer = Trainer(config, ranks)
        state = trainer.state
        machines = environment(ranks)
        agreed(lambda: _begin(trainer, machines) if ranks.main else None)
        outcome: RunState = "failed"
        reason = ""
        try:
            outcome, reason = trainer.run(stop)
        except Exception as error:
            reason = first_failure(error)
            raise
        finally:
            if ranks.main and (reason or outcome != "failed"):
                _end(config, outcome, state.step, reason)
    if outcome == "preempted":
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else EXIT_PREEMPTED
    return EXIT_INCIDENT if outcome == "failed" else 0
