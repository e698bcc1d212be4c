"""A campaign of faults against real runs, and the small test of it that runs with the others."""
