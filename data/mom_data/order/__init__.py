"""The order of the training data, planned from the indices of the shards alone."""
