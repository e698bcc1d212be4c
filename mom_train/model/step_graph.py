"""The forward and backward pass of a micro-batch as CUDA graphs, which the device runs without the host.

Every shape of a micro-batch is known beforehand (B rows of L positions), and nothing in the passes reads a value from
the device. So all their kernels can be recorded once and then started together, which takes the host a few microseconds
instead of about ten for each kernel. What differs from batch to batch is copied into the tensors that were recorded.

Recorded are the row layout, the forward and the backward pass. Not recorded are copies from the host, the norms, the
judgement of the step, the optimiser and all collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mom_data.batches.batch import PackedBatch
from mom_tokenizers.errors import UserError
from mom_train.distributed.ranks import Ranks
from mom_train.model.language_model import LanguageModel, Losses
from mom_train.model.objective import Counts, ObjectiveConfig
from mom_train.model.sharding import gathered_in_bf16

_ON_HOST = ("real_tokens", "latents", "latent_position", "image_of_patch", "image_leads", "sequences")
_WARM_UP = 2  # passes before the recording, in which kernels are compiled and loaded, and libraries make their buffers


def check_device(ranks: Ranks) -> None:
    """Raises UserError where `training.cuda_graph` cannot be done."""
    if ranks.device.type != "cuda":
        raise UserError(
            f"training.cuda_graph needs an NVIDIA GPU, and this run is on {ranks.device.type}; leave it out"
        )
    if ranks.world_size > 1:
        raise UserError(
            f"training.cuda_graph runs on one rank, and here are {ranks.world_size}: what FSDP2 sends between ranks is "
            "not recorded; leave it out"
        )


class StepGraph:
    """Passes over micro-batches of one shape. The model is on one device as a whole, not sharded.

    `score` is the forward pass: the losses of a batch that is on the device, and its loss sums (S,) without gradient.
    With `bf16`, the operands of matrix products are cast to bf16 once a step, all together, instead of at every use;
    the values are those that autocast would make, and their gradients are summed over micro-batches in fp32.
    """

    def __init__(
        self,
        model: LanguageModel,
        score: Callable[[PackedBatch], tuple[Losses, Tensor]],
        device: torch.device,
        bf16: bool,
        accumulates: bool,
        record: bool | None = None,
    ):
        """`accumulates` says whether a step may have several micro-batches. Without `record`, which is the default on a
        CPU, the same passes are run each time."""
        self._model, self._score, self._device = model, score, device
        self._parameters = list(model.parameters())
        self._halves = _Halves(model) if bf16 else None
        self._accumulates = accumulates
        self._record = device.type == "cuda" if record is None else record
        self._batch: PackedBatch | None = None
        self._seeds = torch.zeros(3, device=device)
        self._gradients: list[Tensor | None] = []
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # of a first micro-batch, of a further one
        self._places: list[int] = []  # addresses of the weights that were recorded

    def __call__(self, batch: PackedBatch, counts: Counts, config: ObjectiveConfig, first: bool) -> Tensor:
        """Adds the gradient of a micro-batch to that of the step, or begins a step's with the `first`. Returns the loss
        sums (S,), which the next call overwrites. `batch` is on the host, pinned where there is a GPU."""
        if first and self._halves is not None:
            self._halves.refresh()
        self._fill(batch, seeds_of(counts, config))
        if not self._record:
            return self._passes(first)
        if (places := [p.data_ptr() for p in self._parameters]) != self._places:
            assert first, "weights have moved within a step"
            self._places = places
            self._record_all()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient  # the optimiser has taken it away
        graph, sums = self._graphs[first]
        graph.replay()
        return sums

    def _fill(self, batch: PackedBatch, seeds: Tensor) -> None:
        named = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in _ON_HOST}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        if self._batch is None:
            mine: dict[str, Any] = {n: torch.empty_like(t, device=self._device) for n, t in tensors.items()}
            self._batch = replace(batch, **mine)
        for name, value in tensors.items():
            place = getattr(self._batch, name)
            assert place.shape == value.shape, f"{name} is {tuple(value.shape)}, and {tuple(place.shape)} was recorded"
            place.copy_(value, non_blocking=True)
        self._seeds.copy_(seeds.pin_memory() if self._device.type == "cuda" else seeds, non_blocking=True)

    def _passes(self, first: bool) -> Tensor:
        assert self._batch is not None
        if first:
            for parameter in self._parameters:
                parameter.grad = None
        with self._halves.in_use() if self._halves is not None else nullcontext():
            losses, sums = self._score(self._batch)
            each = zip((losses.tokens, losses.balance, losses.patches), self._seeds, strict=True)
            roots = [(loss, seed) for loss, seed in each if loss.requires_grad]
            torch.autograd.backward([loss for loss, _ in roots], [seed.to(loss.dtype) for loss, seed in roots])
        return sums

    def _record_all(self) -> None:
        """Records the passes of a first micro-batch, whose gradients are new tensors, and then those of a further one,
        which adds to them. Both use the same memory, because they never run side by side."""
        pool, beside = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        each = (True, False) if self._accumulates else (True,)
        self._graphs.clear()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for first in each:
                for _ in range(_WARM_UP):
                    self._passes(first)
        torch.cuda.current_stream().wait_stream(beside)
        # The warm-up comes before both recordings, and leaves nothing: each recording begins with giving back memory
        # that is not in use, so the activations of the warm-up never lie beside those of the graphs.
        for parameter in self._parameters:
            parameter.grad = None
        for first in each:
            graph = torch.cuda.CUDAGraph()
            # thread_local: threads of the loader and of checkpoints pin memory meanwhile
            with torch.cuda.graph(graph, pool=pool, stream=beside, capture_error_mode="thread_local"):
                sums = self._passes(first)
            self._graphs[first] = graph, sums
            if first:
                self._gradients = [p.grad for p in self._parameters]


class _Halves:
    """Copies in bf16 of the weights that are operands of matrix products, which take their places in the passes."""

    def __init__(self, model: LanguageModel):
        masters = gathered_in_bf16(model)
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        for module in model.modules():
            for name, master in module.named_parameters(recurse=False):
                if master in masters:
                    half = nn.Parameter(torch.empty_like(master, dtype=torch.bfloat16))
                    half.register_post_accumulate_grad_hook(partial(_hand_on, master))
                    self._places.append((module, name, master, half))

    @torch.no_grad()
    def refresh(self) -> None:
        """Rounds the weights of now, to nearest even as autocast does."""
        torch._foreach_copy_([half for *_, half in self._places], [master for *_, master, _ in self._places])

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """In this context the modules compute with the copies, and gradients go to the weights themselves."""
        try:
            for module, name, _, half in self._places:
                module._parameters[name] = half
            yield
        finally:
            for module, name, master, _ in self._places:
                module._parameters[name] = master


@torch.no_grad()
def _hand_on(master: nn.Parameter, half: Tensor) -> None:
    """Adds the gradient of a copy to that of the weight, in fp32."""
    assert half.grad is not None
    if master.grad is None:
        master.grad = half.grad.float()
    else:
        master.grad += half.grad
    half.grad = None


def seeds_of(counts: Counts, config: ObjectiveConfig) -> Tensor:
    """The gradient of the objective by the three sums in `Losses` that it is linear in: tokens, balance, patches; (3,)
    fp32 on the CPU."""
    leaves = [torch.zeros((), requires_grad=True) for _ in range(3)]
    tokens, balance, patches = leaves
    nothing = torch.zeros(0)
    loss = counts.objective(Losses(tokens, nothing, patches, balance, nothing, nothing), config)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return torch.stack([torch.zeros(()) if g is None else g for g in found])
