"""Studies: configs of the cells of a grid, which a benchmark of the same name trains and evaluates."""
