"""A path's files: nodes, how they are stored, and what is said of them."""
