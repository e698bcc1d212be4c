"""The operators that the blocks are made of, each with several backends: linear maps by modality, convolution, scan,
norm, cross-entropy."""
