"""Recipes: merges written down as YAML, checked, planned, run and assessed."""
