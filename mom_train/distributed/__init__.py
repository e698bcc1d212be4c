"""What several ranks need: the process group, decisions that all ranks share, and reports on the state of a run."""
