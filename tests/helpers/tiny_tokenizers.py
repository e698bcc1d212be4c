"""Tiny tokenizers for the tests."""

import torch

from mom_tokenizers.image.autoencoder import VQImageTokenizer
from mom_tokenizers.image.patch_network import GROUPS, PatchAutoencoder
from mom_tokenizers.image.patches import PatchImageTokenizer


def random_vq(size):
    """A VQ tokenizer with random weights and 16 codes, for pictures of size x size pixels."""
    from diffusers import VQModel  # here, because it takes seconds

    torch.manual_seed(0)
    model = VQModel(num_vq_embeddings=16, block_out_channels=(8,), norm_num_groups=1, latent_channels=4)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return VQImageTokenizer(model, size)


def random_patches(size):
    """A tokenizer of random squares of 2 x 2 pixels, with 16 codes, for pictures of size x size pixels. A process that
    loads it does without diffusers, which takes seconds to import."""
    generator = torch.Generator().manual_seed(0)
    model = PatchAutoencoder(2, 16, GROUPS, 1)
    model.codebook.copy_(torch.randint(0, 256, model.codebook.shape, generator=generator))
    return PatchImageTokenizer(model, size)
