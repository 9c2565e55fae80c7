"""`rlm keys add|list|revoke --operator`."""

from collections.abc import Sequence

from orchestrator.cli import exits
from orchestrator.cli.books.keys import key_line, moment, put_fresh
from orchestrator.cli.books.session import Books, carry_out
from orchestrator.cli.books.store_desk import moment_of
from orchestrator.cli.json_line import json_line
from orchestrator.errors import NotFoundError
from orchestrator.service.admin import OPERATOR_HERE
from orchestrator.store.books import OperatorKeyRow

ROLE = "operator"


def add(url: str, *, as_json: bool) -> None:
    """Make an operator's key, and print it."""

    async def work(books: Books) -> tuple[OperatorKeyRow, str]:
        return await books.operators.add_key(by=OPERATOR_HERE.actor)

    row, key = carry_out(url, work)
    put_fresh(row.key_id, None, ROLE, key, as_json=as_json)


def show_list(url: str, *, as_json: bool) -> None:
    """Operators' keys, by what tells them apart."""

    async def work(books: Books) -> Sequence[OperatorKeyRow]:
        return await books.operators.keys()

    found = carry_out(url, work)
    if as_json:
        exits.put(json_line({"keys": [_object(row) for row in found]}))
        return
    for row in found:
        revoked_at = None if row.revoked_at is None else moment_of(row.revoked_at)
        exits.put(key_line(row.key_id, ROLE, row.hint, moment_of(row.created_at), revoked_at))


def revoke(url: str, key_id: str, *, as_json: bool) -> None:
    """Make an operator's key unknown.

    Raises:
        NotFoundError: There is no such key.
    """

    async def work(books: Books) -> None:
        if not await books.operators.revoke_key(key_id, by=OPERATOR_HERE.actor):
            raise NotFoundError("there is no such key; `rlm keys list --operator` shows those there are")

    carry_out(url, work)
    if as_json:
        exits.put(json_line({"key_id": key_id, "revoked": True}))


def _object(row: OperatorKeyRow) -> dict[str, object]:
    return {
        "key_id": row.key_id,
        "role": ROLE,
        "hint": row.hint,
        "created_at": moment(moment_of(row.created_at)),
        "revoked_at": None if row.revoked_at is None else moment(moment_of(row.revoked_at)),
    }
