"""Predicts the costs of a run from its config: FLOPs, memory, time of a step. Only `step_time.units` and `gemm`
import torch."""
