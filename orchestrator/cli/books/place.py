"""Where a command finds tenants and keys. Nothing heavy is imported here."""

from typing import NamedTuple

from orchestrator.cli.remote.connection import Connection


class Store(NamedTuple):
    """Which database."""

    url: str
    is_named: bool
    """By an option of the command."""


class Place(NamedTuple):
    """A server, or a database on this machine."""

    store_url: str
    connection: Connection | None
    """Set: the server, whatever the database."""
