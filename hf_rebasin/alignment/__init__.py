"""Alignments: one group element for every symmetry, acting on models."""
