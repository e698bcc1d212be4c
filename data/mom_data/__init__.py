"""Documents, token shards, stream order, packing, batches."""
