"""Data sets as batches that a model takes: text, images and labels."""
