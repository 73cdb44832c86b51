"""Group elements as numbers: permutations, matrices, factors, and their relaxations."""
