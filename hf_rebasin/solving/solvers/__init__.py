"""Solvers: one file each, exporting a frozen dataclass `Solver` (its fields are the knobs) with `solve(problem)`."""
