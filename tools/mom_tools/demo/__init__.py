"""The main job on one machine, and the corpus that it makes for itself."""
