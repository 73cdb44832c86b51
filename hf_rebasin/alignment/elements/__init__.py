"""Group elements as tensors: permutations, matrices, factors, and their relaxations."""
