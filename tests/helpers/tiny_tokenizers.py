"""Tiny tokenizers for the tests."""

import torch
from diffusers import VQModel

from mom_tokenizers.image.autoencoder import VQImageTokenizer


def random_vq(size):
    """A VQ tokenizer with random weights and 16 codes, for pictures of size x size pixels."""
    torch.manual_seed(0)
    model = VQModel(num_vq_embeddings=16, block_out_channels=(8,), norm_num_groups=1, latent_channels=4)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return VQImageTokenizer(model, size)
