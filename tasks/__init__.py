"""How a job travels: queues, the live record, workers. Headless: no flask, no sqlalchemy, no torch."""

from celery import Celery

celery = Celery("tasks")
celery.config_from_object("celeryconfig")
