"""Language models: each decode step runs all jobs that are under way."""
