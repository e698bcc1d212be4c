"""Training: config, model, kernels, optimiser, ranks, checkpoints, generation, records and costs of a run."""

import mom_tokenizers  # noqa: F401  # before torch, because it sets how the threads of torch wait
