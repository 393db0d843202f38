"""Models that draw, by diffusers."""
