"""Contexts whose rows are gone, and whose files are to go."""

from sqlalchemy import ColumnElement, delete, select

from orchestrator.store.backend import Transaction
from orchestrator.store.database import Database
from orchestrator.store.tables import contexts, doomed_contexts


async def doom(database: Database, connection: Transaction, which: ColumnElement[bool]) -> int:
    """Remove contexts, and note for their homes that files are to go; how many.

    In one transaction: so a server that is killed between, or that is not the one which has the file, leaves
    nothing behind.
    """
    columns = [column.name for column in doomed_contexts.c]
    await connection.execute(
        database.insert(doomed_contexts).from_select(
            columns, select(*(contexts.c[name] for name in columns)).where(which)
        )
    )
    return (await connection.execute(delete(contexts).where(which))).rowcount
