"""A sequence read chunk by chunk, or token by token, with a carried state gives the same as the whole at once."""

import pytest
import torch

from mom_train.config.model import PROJECTIONS, DiffusionConfig, ModelConfig
from mom_train.model.diffusion import NoisedPatches
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel
from mom_train.ops.layout import RowLayout

M, V, L = 3, 96, 30
ARCHITECTURES = {
    "mom": ModelConfig(dim=32, layers=2, decoupled=PROJECTIONS),
    "mamba": ModelConfig(dim=32, layers=2, decoupled=()),
    "least": ModelConfig(dim=8, layers=1, decoupled=PROJECTIONS, conv=1, state=1, expand=1, dt_rank=1),
    "normalised": ModelConfig(dim=32, layers=2, decoupled=PROJECTIONS, normalise=True),
    "transformer": ModelConfig(architecture="transformer", dim=32, layers=2, heads=2, decoupled=()),
    "mot": ModelConfig(
        architecture="transformer",
        dim=32,
        layers=2,
        heads=2,
        decoupled=("attention", "feed_forward", "norm"),
        qk_norm=True,
    ),
}


@pytest.mark.parametrize("chunks", [[L], [1] * L, [7, 1, 2, 20]])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prefill_and_steps_equal_the_full_forward(name, chunks):
    diffusion = DiffusionConfig(patch_width=4)
    model = LanguageModel(ARCHITECTURES[name], V, M, diffusion=diffusion).eval()
    initialize(model, 0)
    torch.nn.init.normal_(model.patch_head.patch_out.weight)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, V, (2, L), generator=g)
    modality = torch.randint(0, M, (2, L), generator=g).to(torch.uint8)
    document = torch.zeros(2, L, dtype=torch.int32)
    if (
        ARCHITECTURES[name].architecture == "mamba"
    ):  # attention's past belongs to one document; a state that is reset needs no such care
        document[0, 11:] = 1
    whole = RowLayout.sort(modality, document, M)
    with torch.no_grad():
        expected = model(tokens.view(-1)[whole.rows], whole)[0][whole.order.long()].view(2, L, V)
        state, got, at = model.empty_state(2), [], 0
        for n in chunks:
            part = slice(at, at + n)
            past = (document[:, :at] == document[:, at : at + 1]).sum(1)
            layout = RowLayout.sort(modality[:, part], document[:, part], M, past_B=past)
            logits, _ = model(tokens[:, part].reshape(-1)[layout.rows], layout, state=state)
            got.append(logits[layout.order.long()].view(2, n, V))
            at += n
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_picture_denoised_from_the_saved_state_equals_the_whole_sequence(name):
    """This is what sampling a picture does: it computes all patches at once from the state after the opening
    bracket."""
    model = LanguageModel(ARCHITECTURES[name], V, M, diffusion=DiffusionConfig(patch_width=4)).eval()
    initialize(model, 0)
    torch.nn.init.normal_(model.patch_head.patch_out.weight)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, V, (1, L), generator=g)
    modality = torch.zeros(1, L, dtype=torch.uint8)
    modality[0, 12:21] = 1
    picture = torch.full((1, L), -1, dtype=torch.int32)
    picture[0, 12:21] = 0
    document = torch.zeros(1, L, dtype=torch.int32)
    x, zeros, t = torch.randn(9, 4, generator=g), torch.zeros(9, dtype=torch.int64), torch.tensor([700])
    with torch.no_grad():
        layout = RowLayout.sort(modality, document, M, picture_BL=picture)
        at = layout.order.long()[12:21]
        _, expected = model(tokens[0][layout.rows], layout, None, NoisedPatches(x, x, at, zeros, t))
        state = model.empty_state(1)
        past = torch.tensor([12])
        first = RowLayout.sort(modality[:, :12], document[:, :12], M)
        model(tokens[0, :12][first.rows], first, state=state)
        part = RowLayout.sort(modality[:, 12:21], document[:, :9], M, past_B=past, picture_BL=picture[:, 12:21])
        _, got = model(tokens[0, 12:21], part, None, NoisedPatches(x, x, part.order.long(), zeros, t), state)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
