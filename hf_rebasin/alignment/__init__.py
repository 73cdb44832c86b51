"""Alignments: one group element for every symmetry, and how they act on models."""
