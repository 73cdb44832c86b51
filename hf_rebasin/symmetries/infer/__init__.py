"""Reading the symmetries of any module off its own forward pass, and writing them down as a table."""
