"""What can be run: loaded models that answer one job type each. No Celery, no HTTP."""
