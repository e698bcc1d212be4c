"""Evaluates models on tasks: those of lm-evaluation-harness, and multi-modal ones by likelihood."""
