"""Ranks: the process group, decisions that all ranks make alike, and how a run tells others how it stands."""
