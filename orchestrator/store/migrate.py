"""Brings a database's tables up to what this version needs. The steps are in `migrations/versions`."""

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from orchestrator.errors import StoreError

_SCRIPTS = Path(__file__).parent / "migrations"


def upgrade(connection: Connection, *, up_to: str = "head") -> None:
    """Take every step that is missing, in the transaction of this connection.

    Args:
        connection: To the database.
        up_to: The last step to take; for tests of those behind it.

    Raises:
        StoreError: The database has steps that this version does not know.
    """
    last, known = _steps()
    taken = MigrationContext.configure(connection).get_current_heads()
    if not known.issuperset(taken):
        raise StoreError("the database was used by a later version of rlm; this one can't read it")
    if taken == (last,):
        return
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, up_to)


@cache
def _steps() -> tuple[str | None, frozenset[str]]:
    """The last one, and all. To read them takes as long as to take them."""
    scripts = ScriptDirectory.from_config(_config())
    return scripts.get_current_head(), frozenset(one.revision for one in scripts.walk_revisions())


def _config() -> Config:
    config = Config()
    # Alembic's configuration expands %(...)s.
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    return config
