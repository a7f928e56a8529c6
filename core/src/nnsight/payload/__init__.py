"""A block, a run and its results as data: source, JSON and tensors. No pickle."""
