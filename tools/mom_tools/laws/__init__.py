"""Scaling laws by modality: plans and trains a grid of sizes and budgets, and fits losses over them."""
