"""RMSNorm joined with the addition before it: its operator, its definition, and its backends."""
