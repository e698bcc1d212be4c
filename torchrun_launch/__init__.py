"""Starts ranks: on this machine through torchrun, on a cluster through Slurm. Imports no model code."""
