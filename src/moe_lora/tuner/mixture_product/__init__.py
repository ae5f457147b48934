"""The mixture of experts as tensor functions."""
