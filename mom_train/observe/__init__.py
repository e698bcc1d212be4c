"""What a run records about itself: figures, charts, and the machines that it ran on."""
