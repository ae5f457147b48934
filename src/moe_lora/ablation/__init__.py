"""Leave an expert out, and measure what it is for."""
