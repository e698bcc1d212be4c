"""Models of other programs: weights that are read from them, and exports that they can read."""
