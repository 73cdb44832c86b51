"""Finding the alignment of two models: the problem, similarities, and one file a solver."""
