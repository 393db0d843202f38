"""The console in a real browser: one platform with workers that need no weights, one headless Chromium."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import waitress
from axe_playwright_python.sync_playwright import Axe
from flask import Flask
from playwright.sync_api import Browser, Page, expect, sync_playwright

from app import create_app
from app.settings import Settings
from tasks.settings import load_regions
from tests.conftest import Valkey
from tests.rig import ECHO, EVERY_TYPE, Platform, free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
# A microphone that beeps.
FLAGS += ["--use-fake-device-for-media-stream"]
THREADS = 24
# Five seconds, the default, are less than a busy machine may take.
expect.set_options(timeout=20_000)
#: The rules of WCAG 2.2 on levels A and AA.
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}


@contextmanager
def served(app: Flask) -> Iterator[str]:
    """The app under waitress, as app/serve.py runs it; its URL."""
    server = waitress.create_server(app, host="127.0.0.1", port=0, threads=THREADS, channel_request_lookahead=1)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.effective_port}"
    app.extensions["streams"].stopping.set()
    server.close()
    thread.join(10)
    app.extensions["dispatch"].close()
    app.extensions["database"].dispose()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A server of the module's own: others empty theirs between tests."""
    server = Valkey(free_port(), tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def make_app(store: Valkey, migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Flask]:
    """Makes APIs with a database of their own on the module's store; changes of their settings by name."""

    def make(**changes: Any) -> Flask:
        folder = tmp_path_factory.mktemp("api")
        shutil.copy(migrated, folder / "jobs.db")
        regions = load_regions({"GPU_STORE_URL": f"{store.url}/1", "GPU_BROKER_URL": f"{store.url}/0"})
        url = f"sqlite:///{folder / 'jobs.db'}"
        return create_app(Settings(url, str(folder / "blobs"), regions, "asia-east", threads=THREADS, **changes))

    return make


@pytest.fixture(scope="module")
def platform(
    store: Valkey, make_app: Callable[..., Flask], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    """Control and a worker for every type; `app` is its API."""
    app = make_app()
    environ = {
        **os.environ,
        "GPU_BROKER_URL": f"{store.url}/0",
        "GPU_STORE_URL": f"{store.url}/1",
        "DATABASE_URL": app.extensions["settings"].database_url,
    }
    running = Platform(environ, tmp_path_factory.mktemp("platform"))
    running.app = app  # type: ignore[attr-defined]
    running.start_control()
    running.start_worker(queues=EVERY_TYPE, **ECHO)
    yield running
    running.close()


@pytest.fixture(scope="module")
def site(platform: Platform) -> Iterator[str]:
    """The URL of an API that nobody needs a key for."""
    with served(platform.app) as url:  # type: ignore[attr-defined]
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium of the system's; skips where there is none, and fails in CI."""
    if CHROMIUM is None:
        reason = "no chromium is installed (apt-get install chromium)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh profile in English, whose console errors and foreign requests fail the test."""
    context = browser.new_context(locale="en-GB", viewport={"width": 1300, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(20_000)
    wrong: list[str] = []
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda asked: (
            wrong.append(asked.url) if not asked.url.startswith(("http://127.0.0.1", "data:", "blob:")) else None
        ),
    )
    page.wrong = wrong  # type: ignore[attr-defined]
    yield page
    context.close()
    assert wrong == []


@pytest.fixture
def check_phone() -> Callable[..., None]:
    """Checks a page as it is: nothing is wider than a phone, and no rule is broken, light and dark."""

    def check(page: Page, themes: Sequence[str] = ("light", "dark")) -> None:
        page.set_viewport_size({"width": 375, "height": 812})
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        for theme in themes:
            page.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
            found = Axe().run(page, options=RULES)
            assert found.violations_count == 0, found.generate_report()

    return check
