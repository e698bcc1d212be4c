"""Image tokenizers: pictures become codes or latent patches, and pictures again."""
