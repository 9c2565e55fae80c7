"""The database's own clock, as a Unix time in seconds: one clock for all servers of it.

It moves within a transaction too: one that waited for a lock must not take an old time for now.
"""

from typing import Any

from sqlalchemy import Double
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement


class database_now(FunctionElement[float]):  # noqa: N801 - a function of SQL, like those of `sqlalchemy.func`
    """What the clock shows."""

    type = Double()
    inherit_cache = True


@compiles(database_now, "postgresql")
def _postgresql(_element: database_now, _compiler: SQLCompiler, **_: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


@compiles(database_now, "sqlite")
def _sqlite(_element: database_now, _compiler: SQLCompiler, **_: Any) -> str:
    # `unixepoch` has no fractions before SQLite 3.42.
    return "((julianday('now') - 2440587.5) * 86400.0)"
