"""Checkpoints: how they are saved while training goes on, where they are stored, and how their files are verified."""
