"""Brings a database's tables up to what this version needs. The steps are in `migrations/versions`."""

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
    config = Config()
    # Alembic's configuration expands %(...)s.
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if not known.issuperset(MigrationContext.configure(connection).get_current_heads()):
        raise StoreError("the database was used by a later version of rlm; this one can't read it")
    command.upgrade(config, up_to)
