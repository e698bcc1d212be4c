"""Encoded pictures and recordings: which formats are read, and what they decode to."""
