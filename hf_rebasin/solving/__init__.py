"""Finding the alignment of two models: the problem, similarities, and solvers, one file each."""
