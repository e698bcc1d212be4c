"""The config of a run: its schema, its files, and what is checked before torch is imported."""
