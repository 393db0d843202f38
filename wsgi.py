"""The WSGI entry: `python -m app.serve`, `flask --app wsgi ...`, or any threaded WSGI server on `wsgi:app`."""

import os

from dotenv import find_dotenv, load_dotenv

from app import create_app
from tasks import tracing

load_dotenv(find_dotenv(usecwd=True))
tracing.start("api", os.environ)
app = create_app()
