"""Decode latents into images with gradient, whole or in windows."""
