"""The tensors of an adapter: their names, and whether they fit a model."""
