"""The pages as programs: their blocks, their commands, and stand-ins for downloaded models."""
