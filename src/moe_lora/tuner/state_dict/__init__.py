"""The tensors of an adapter: their names, and checks against a model."""
