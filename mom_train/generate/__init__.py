"""Documents that a trained model writes: the sampler, and the files that its samples become."""
