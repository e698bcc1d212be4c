"""Softmax cross-entropy with its gradient: its operator, its definition, and its backends."""
