"""Tiny tokenizers for the tests."""

import torch
from diffusers import VQModel

from mom_tokenizers.image.autoencoder import VQImageTokenizer


def random_vq(size):
    """Of pictures of size² pixels, 16 codes, random weights."""
    torch.manual_seed(0)
    model = VQModel(num_vq_embeddings=16, block_out_channels=(8,), norm_num_groups=1, latent_channels=4)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return VQImageTokenizer(model, size)
