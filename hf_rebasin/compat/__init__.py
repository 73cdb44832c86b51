"""The interfaces of the two rebasin packages, on our own solvers."""
