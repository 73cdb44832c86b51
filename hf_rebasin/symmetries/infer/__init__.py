"""Read the symmetries of any module off its own forward pass, and write them down as a table."""
