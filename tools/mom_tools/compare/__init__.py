"""Commands that compare runs with each other and with the paper."""
