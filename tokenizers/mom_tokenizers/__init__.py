"""Tokenizers for text, pictures and recordings. They take plain values (str, PIL image, float waveform); this package
knows neither documents nor the model that is trained.

    base       the interface of every tokenizer, and the fingerprint of its files
    text       text tokens
    image/     codes and latent patches of pictures
    speech/    units of recordings
    ready      ids that were made by another program
    media/     decodes the files of pictures and recordings
    bundle     the tokenizers of a data set, as tokenizers.yaml names them
    vocab      the ids of all modalities in one vocabulary
    published  loads published models from local folders
    errors     errors that users can mend, and exit codes
    files      replaces files in one step
"""

import os

# Every program of this project imports this package before torch, because torch's OpenMP runtime reads the variable
# only once. Threads that spin while they wait take cores from other processes, which can be many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
