"""The whole platform on one machine: `python -m local.up`, `python -m local.demo`."""
