"""Describe masks by numbers: area, contour, topology, and the detail around them."""
