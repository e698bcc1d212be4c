"""Documents, token shards, stream order, packing, batches."""

import mom_tokenizers  # noqa: F401  # before torch: how its threads wait
