"""Symmetries of models: the pattern language, one table per family, and inference from the forward pass."""
