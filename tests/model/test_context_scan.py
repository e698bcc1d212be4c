"""Rows whose positions are divided among several ranks give the outputs and gradients of one rank with whole rows."""

import numpy as np
import pytest
import torch

from mom_train.config.model import PROJECTIONS, ModelConfig
from mom_train.config.run import RunConfig
from mom_train.distributed.context import Context
from mom_train.model.context_scan import slice_of_rows
from mom_train.ops.layout import RowLayout
from tests.helpers.ranks import run_ranks
from tests.helpers.run_config import tiny_config
from tests.helpers.settings import ARCHITECTURES, SETTINGS, write_digits
from tests.helpers.steps import assert_same, train_steps

M, V = 3, 96
B, L = 2, 64


def rows(documents):
    """modality, document, tokens, labels (B, L). Documents that cross slices, end at a slice's end, or begin in it."""
    g = torch.Generator().manual_seed(1)
    modality = torch.randint(0, M, (B, L), generator=g)
    modality[:, 16:32] = 1  # a slice of one modality alone
    starts = torch.zeros(B, L, dtype=torch.int32)
    for b, positions in enumerate(documents):
        starts[b, positions] = 1
    tokens, labels = torch.randint(0, V, (2, B, L), generator=g)
    labels[:, ::7] = -100
    return modality.to(torch.uint8), starts.cumsum(1).to(torch.int32), tokens, labels


def packed(modality, document, tokens, labels):
    from mom_data.batches.batch import PackedBatch

    layout = RowLayout.sort(modality, document, M)
    none = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        tokens=tokens, modality=modality, document=document, labels=labels, latents=torch.zeros(0, 0),
        latent_position=none, image_of_patch=none, image_leads=none.bool(), sequences=torch.arange(B),
        order=layout.order, rows=layout.rows, offsets=layout.offsets, real_tokens=none,
    )  # fmt: skip


CROSSING = [[], [5, 16, 40]]  # one document over all slices; one that begins in each way there is
TOGETHER = [[16, 32, 48], [20, 21, 22, 63]]  # documents that end where slices do
CUT = [[32], [32]]
CASES = (
    (CROSSING, "float64", 1e-7, True),
    (CROSSING, "float32", 1e-5, False),
    (CROSSING, "float32", 1e-5, True),
    (TOGETHER, "float32", 1e-5, False),
)
"""(documents, dtype, tolerance, model.normalise). float64 takes the PyTorch kernels (the time step's bias is fp32
there, too), float32 the C kernels where they are."""


def losses_and_gradients(context, documents, dtype, normalise=False):
    """(the loss of each of this rank's positions in time order, its share of every gradient) of the whole model."""
    from mom_train.model.init import initialize
    from mom_train.model.language_model import LanguageModel
    from mom_train.model.objective import row_layout

    model = LanguageModel(ModelConfig(dim=32, layers=2, decoupled=PROJECTIONS, normalise=normalise), V, M)
    initialize(model, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("dt_bias"):
                p.sub_(3)  # slow decay: what the first slice holds still matters in the last
    model.to(getattr(torch, dtype))
    batch, _, past = slice_of_rows(context, packed(*rows(documents)), None)
    layout = row_layout(batch, None, past, context if context.size > 1 else None)
    losses = model(batch.tokens.reshape(-1)[batch.rows], layout, batch.labels.reshape(-1)[batch.rows])
    losses.tokens.backward()
    nats = losses.tokens_T[layout.order.long()].view(B, -1)
    return nats.numpy(), {n: p.grad.numpy() for n, p in model.named_parameters()}


def on_ranks():
    from mom_train.distributed.ranks import process_group

    with process_group() as ranks:
        context = Context.of(ranks, ranks.world_size)
        return [losses_and_gradients(context, documents, dtype, n) for documents, dtype, _, n in CASES]


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_and_all_gradients_are_those_of_one_rank(ranks):
    results = run_ranks(ranks, on_ranks)
    for case, (documents, dtype, tolerance, normalise) in enumerate(CASES):
        whole, gradients = losses_and_gradients(Context(), documents, dtype, normalise)
        slices = [of_rank[case] for of_rank in results]
        nats = np.concatenate([nats for nats, _ in slices], 1)
        assert np.abs(nats - whole).max() < tolerance * np.abs(whole).max()
        for name, expected in gradients.items():
            total = sum(of_rank[name].astype(np.float64) for _, of_rank in slices)
            assert np.abs(expected).max() > 0, name
            assert np.abs(total - expected).max() < 10 * tolerance * np.abs(expected).max(), name


def test_a_later_slice_depends_on_an_earlier_one():
    """This shows that the test above cannot pass by dropping what crosses slices: cutting the documents changes the
    losses."""
    whole, _ = losses_and_gradients(Context(), [[], []], "float32")
    cut, _ = losses_and_gradients(Context(), CUT, "float32")
    assert np.array_equal(whole[:, :32], cut[:, :32])
    assert np.abs(whole[:, 48:] - cut[:, 48:]).max() > 1e-3


def smooth(folder, context, **changes):
    """The config of tests/distributed/test_ranks.py with one row in a micro-batch."""
    optimizer = {"learning_rate": 0.01, "warmup": 0, "eps": 1e-3, "clip": 0.05}
    parallel = {"context_ranks": context}
    return tiny_config(folder, **{"training__batch": 4, "optimizer": optimizer, "parallel": parallel} | changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, run_ranks(1, train_steps, smooth(folder, 1), 2)[0]


@pytest.mark.parametrize(
    ("world", "context", "training"),
    [
        (2, 2, {}),
        (4, 4, {"training__activation_checkpointing": True}),
        (
            4,
            2,
            {
                "parallel": {"context_ranks": 2, "shard_ranks": 2},
                "training__activation_checkpointing": "selective",
            },
        ),
    ],
    ids=["two slices", "four slices, recomputed", "two by two, replicas, selective"],
)
def test_training_does_not_depend_on_how_many_ranks_share_a_row(alone, world, context, training):
    folder, one = alone
    for rank in run_ranks(world, train_steps, smooth(folder, context, **training), 2):
        assert_same(rank, one)


def transfusion(folder, context):
    model = {"dim": 32, "layers": 1, "decoupled": ["in_proj", "out_proj"]}
    values = SETTINGS["transfusion"] | {"model": model, "parallel": {"context_ranks": context}}
    return RunConfig.model_validate({
        **values,
        "run_dir": str(folder / "run"),
        "data": {"train": [{"path": str(folder / "digits")}], "sequence_length": 256, "lanes": 2, "workers": 0},
        "optimizer": {"learning_rate": 0.01, "eps": 1e-3, "clip": 0.05},
        "training": {"steps": 30, "batch": 4, "micro_batch": 2, "precision": "bf16"},
    })  # fmt: skip


def test_pictures_that_lie_on_several_ranks_are_noised_as_on_one(tmp_path):
    """A picture has 16 patches and a slice 64 positions, so some pictures are cut. Products are in bf16, so the
    tolerance is that of bf16."""
    write_digits(tmp_path / "digits", SETTINGS["transfusion"]["vocabulary"], True)
    [one] = run_ranks(1, train_steps, transfusion(tmp_path, 1), 1)
    for rank in run_ranks(4, train_steps, transfusion(tmp_path, 4), 1):
        [(losses, norms, _)], [(expected, expected_norms, _)] = rank["history"], one["history"]
        assert losses == pytest.approx(expected, rel=2e-3)
        assert norms == pytest.approx(expected_norms, rel=2e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": ARCHITECTURES["transformer"]},
            "only the state of a mamba can go from rank to rank",
        ),
        ({"data__sequence_length": 129}, "must divide data.sequence_length=129"),
        ({"data__sequence_length": 4}, "slices of at least 3 positions"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        smooth(tmp_path, 2, **changes)


def test_ranks_and_batch_must_be_dealt_evenly(tmp_path):
    config = smooth(tmp_path, 2)
    assert config.accumulation(2) == 4
    assert config.accumulation(8) == 1
    with pytest.raises(ValueError, match="context_ranks=2 does not divide the 3 ranks"):
        config.accumulation(3)
    with pytest.raises(ValueError, match=r"\(12 / 2\) \(1 x 6 = 6\)"):
        config.accumulation(12)
