"""The WSGI entry: `python -m app.serve`, `flask --app wsgi ...`, or any threaded WSGI server on `wsgi:app`."""

from dotenv import find_dotenv, load_dotenv

from app import create_app

load_dotenv(find_dotenv(usecwd=True))
app = create_app()
