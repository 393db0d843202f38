"""What the tests of bad input share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.services import NAMES, Service, open_service

SEED = 1


@pytest.fixture(params=NAMES)
def service(request: pytest.FixtureRequest, valkey: Any, migrated: Path, tmp_path: Path) -> Iterator[Service]:
    """Each service on real parts."""
    with open_service(request.param, tmp_path, valkey.url, migrated, seed=SEED) as opened:
        yield opened


@pytest.fixture
def api(valkey: Any, migrated: Path, tmp_path: Path) -> Iterator[Service]:
    """The main API alone."""
    with open_service("api", tmp_path, valkey.url, migrated, seed=SEED) as opened:
        yield opened
