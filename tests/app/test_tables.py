"""The database is brought up to date by its migrations, and they say what the tables say."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import IntegrityError

from app.tables import _alembic, is_current, metadata, now, open_database, upgrade


@pytest.fixture(params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database that nobody has opened yet."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/folder/new.db"
        return
    postgres = request.getfixturevalue("postgres")
    yield postgres.create("new")
    postgres.drop("new")


@pytest.fixture
def database(any_database_url: str) -> Iterator[Engine]:
    """A migrated database."""
    engine = open_database(any_database_url)
    yield engine
    engine.dispose()


def test_a_new_database_is_current_after_an_upgrade_and_another_one_changes_nothing(new_url):
    engine = open_database(new_url)
    assert not is_current(engine)

    upgrade(new_url)
    assert is_current(engine)

    upgrade(new_url)
    assert is_current(engine)
    engine.dispose()


def test_the_migrations_make_what_the_tables_say(database):
    with database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})

        assert compare_metadata(context, metadata) == []


def test_the_databases_clock_tells_unix_seconds_and_goes_on_within_a_connection(database):
    with database.connect() as connection:
        before = time.time()
        first = connection.execute(select(now())).scalar_one()
        time.sleep(0.05)
        second = connection.execute(select(now())).scalar_one()

    assert first == pytest.approx(before, abs=0.5)
    assert 0.04 < second - first < 0.5


def test_a_state_that_nobody_knows_is_refused(database):
    columns = "id, owner, type, params, priority, region, allow_cross_region, timeout_seconds, status, attempt, version"
    values = "'x', 'x', 'llm', '{}', 0, 'x', true, 1, 'lost', 1, 1"
    statement = f"INSERT INTO jobs ({columns}, created_at, sends, withdrawn) VALUES ({values}, 0, 0, false)"

    with database.connect() as connection, pytest.raises(IntegrityError):
        connection.execute(text(statement))


def test_keys_of_the_time_before_owners_go_on_owning_their_jobs(new_url):
    config = _alembic()
    engine = open_database(new_url)
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0005")
        values = "('0a1b2c3d', 'alice', 'x', 'infer', 1)"
        connection.execute(text(f"INSERT INTO api_keys (id, name, digest, scopes, created_at) VALUES {values}"))

    upgrade(new_url)

    with engine.connect() as connection:
        assert connection.execute(text("SELECT id, owner FROM api_keys")).all() == [("0a1b2c3d", "0a1b2c3d")]
    engine.dispose()
