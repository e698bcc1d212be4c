"""The selective scan: its operator, its definition, and its backends."""
