"""Tokenizers on plain values: str, PIL image, float waveform. Knows no documents and no model."""
