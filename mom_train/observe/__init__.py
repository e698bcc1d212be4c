"""What a run writes down about itself: figures, charts, and the machine that it ran on."""
