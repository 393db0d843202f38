"""The routes of OpenAI's API under /v1: each call is a job, and existing clients need only another base URL.

docs/openai.md says what is supported; errors have OpenAI's shape (errors.py), whatever part of the app raises them.
"""

from app.openai.audio import create_transcription, create_translation
from app.openai.chat import create_chat
from app.openai.completions import create_completion
from app.openai.embeddings import create_embeddings
from app.openai.errors import shape
from app.openai.images import create_images
from app.openai.models import list_models, show_model
from app.openai.routes import PREFIX, blueprint

__all__ = [
    "PREFIX",
    "blueprint",
    "create_chat",
    "create_completion",
    "create_embeddings",
    "create_images",
    "create_transcription",
    "create_translation",
    "list_models",
    "shape",
    "show_model",
]
