"""Packed rows as tensors, and the loader that brings them to a rank."""
