"""Held-out documents: their losses, and what their likelihoods say about retrieval, conditions and minimal pairs."""
