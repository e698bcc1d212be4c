"""Batches of tensors from planned rows.

batch       reads the documents of packed rows and lays them out as tensors
loader      yields the batches of one rank, made in this process or by worker processes
wire        sends a batch from a worker process to the rank as one buffer
statistics  computes the unigram baseline that a model must beat
"""
