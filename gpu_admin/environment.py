"""What the entries of this package start from: .env, and the environment over it."""

from dotenv import find_dotenv, load_dotenv

from gpu_admin.settings import Settings


def read_settings() -> Settings:
    """The settings as .env, gpu_admin.yaml and the environment state them. Raises SettingsError."""
    load_dotenv(find_dotenv(usecwd=True))
    return Settings.from_environ()
