"""The config of a run: its schema, how its files are read, and what is checked before torch is imported."""
