"""Merging models that share their coordinates: the methods, their parameters, and the repair of statistics."""
