"""Token datasets: how shards are made from documents, stored, verified, and opened for reading."""
