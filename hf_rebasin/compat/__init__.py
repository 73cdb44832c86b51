"""The interfaces of the two rebasin packages, implemented with our own solvers."""
