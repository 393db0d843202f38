"""One host's GPUs, processes and model servers."""
