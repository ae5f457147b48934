"""Validation of a configuration's fields, and of the names of adapters and experts."""
