"""From a routing decision to the weights of one layer."""
