"""The routers inside an adapted model, and the hooks that run them."""
