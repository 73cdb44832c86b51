"""Symmetries of models: the language of tables, one table a family, and inference from the forward pass."""
