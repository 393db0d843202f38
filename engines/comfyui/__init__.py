"""Workflows, run by a ComfyUI of the host."""
