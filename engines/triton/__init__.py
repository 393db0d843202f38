"""Inferences, run by a Triton server of the host."""
