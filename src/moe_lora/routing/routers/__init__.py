"""Routers: the base class, the registry, and the routers of the library."""
