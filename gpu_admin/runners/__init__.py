"""One file for each kind of model server: each has a class Runner (gpu_admin/contract.py)."""
