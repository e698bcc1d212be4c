"""Commands that make, look at and verify token datasets and tokenizers."""
