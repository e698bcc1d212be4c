"""Helpers that several tests share: a small corpus, a small config, real ranks, and a real Slurm."""

from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
"""The folder that holds README.md."""
