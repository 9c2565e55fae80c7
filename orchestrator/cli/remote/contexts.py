"""`rlm contexts list|upload|delete`."""

from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

from orchestrator.cli import exits
from orchestrator.cli.json_line import json_line
from orchestrator.cli.remote.connection import Connection
from orchestrator.cli.remote.session import carry_out
from orchestrator.cli.remote.shapes import context_object, uploaded_object
from orchestrator.client import Client, Context
from orchestrator.visible import visible_line

_NAME_CHARS = 100


def show_list(connection: Connection, *, most: int, as_json: bool) -> None:
    """List contexts on stdout."""

    async def work(client: Client) -> list[Context]:
        found: list[Context] = []
        async with aclosing(client.list_contexts()) as listed:
            async for context in listed:
                found.append(context)
                if len(found) == most:
                    break
        return found

    found = carry_out(connection, work)
    if as_json:
        exits.put(json_line({"contexts": [context_object(context) for context in found]}))
        return
    for context in found:
        exits.put(
            f"{visible_line(context.context_id, 40)}  {context.created_at:%Y-%m-%d %H:%M}Z"
            f"  {context.length_bytes:>15,}  {visible_line(context.name, _NAME_CHARS)}"
        )


def upload(connection: Connection, paths: Sequence[Path], *, name: str | None, as_json: bool) -> None:
    """Send a context; its id goes to stdout."""
    uploaded = carry_out(connection, lambda client: client.upload(*paths, name=name))
    for note in uploaded.notes:
        exits.tell(f"rlm: {note}")
    if as_json:
        exits.put(json_line(uploaded_object(uploaded)))
        return
    how = "was there already" if uploaded.existed else "is there"
    exits.tell(f"rlm: {uploaded.name} {how}: {uploaded.length_bytes:,} bytes")
    exits.put(uploaded.context_id)


def delete(connection: Connection, context_id: str, *, as_json: bool) -> None:
    """Delete a context."""
    carry_out(connection, lambda client: client.delete_context(context_id))
    if as_json:
        exits.put(json_line({"context_id": context_id, "deleted": True}))
