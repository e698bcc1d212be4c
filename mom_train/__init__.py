"""Model, objectives, optimiser, FSDP2, checkpoint, trainer."""

import mom_tokenizers  # noqa: F401  # before torch: how its threads wait
