"""Optimizers: a file each, which says what `optim.name` of its name is, what it goes with and what it keeps."""
