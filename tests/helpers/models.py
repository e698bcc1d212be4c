"""A small language model and a batch for it."""

import torch

from mom_train.config.model import PROJECTIONS, ModelConfig
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel
from mom_train.ops.layout import RowLayout

SMALL = ModelConfig(dim=32, layers=1, decoupled=PROJECTIONS)


V, M = 96, 3


def build(config=SMALL, seed=0, modalities=M):
    model = LanguageModel(config, V, modalities)
    initialize(model, seed)
    return model


def batch(B=2, L=24, seed=0, missing=None):
    g = torch.Generator().manual_seed(seed)
    modality = torch.randint(0, M, (B, L), generator=g)
    if missing is not None:
        modality[modality == missing] = 0
    document = (torch.rand(B, L, generator=g) < 0.12).cumsum(1)
    tokens, labels = torch.randint(0, V, (2, B, L), generator=g)
    return modality.to(torch.uint8), document.to(torch.int32), tokens, labels


def run(model, modality, document, tokens, labels):
    layout = RowLayout.sort(modality, document, M)
    losses = model(tokens.reshape(-1)[layout.rows], layout, labels.reshape(-1)[layout.rows])
    return losses.tokens, losses.tokens_T[layout.order.long()].view_as(tokens)
