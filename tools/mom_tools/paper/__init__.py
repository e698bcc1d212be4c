"""The paper in miniature, and the tables that the paper prints."""
