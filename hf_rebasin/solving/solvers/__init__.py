"""Solvers, one file each, with a class `Solver`; `SolverClass` in registry.py is its contract."""
