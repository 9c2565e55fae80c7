"""`rlm runs list|show|cancel|resume|delete`."""

from collections.abc import Collection
from contextlib import aclosing

from orchestrator.cli import exits, words
from orchestrator.cli.json_line import json_line
from orchestrator.cli.remote.connection import Connection
from orchestrator.cli.remote.session import carry_out
from orchestrator.cli.remote.shapes import run_object
from orchestrator.client import Client, Run, RunState
from orchestrator.visible import visible_line

_QUESTION_CHARS = 60
_WIDEST = 40


def show_list(
    connection: Connection, *, states: Collection[str], outcomes: Collection[str], most: int, as_json: bool
) -> None:
    """List runs on stdout."""

    async def work(client: Client) -> list[Run]:
        found: list[Run] = []
        async with aclosing(
            client.list_runs(states=[RunState(state) for state in states], outcomes=outcomes)
        ) as listed:
            async for run in listed:
                found.append(run)
                if len(found) == most:
                    break
        return found

    found = carry_out(connection, work)
    if as_json:
        exits.put(json_line({"runs": [run_object(run) for run in found]}))
        return
    for run in found:
        exits.put(_line(run))


def show(connection: Connection, run_id: str, *, as_json: bool) -> None:
    """One run on stdout, and its answer."""

    async def work(client: Client) -> tuple[Run, str | None]:
        run = await client.get_run(run_id)
        return run, await client.read_answer(run)

    run, answer = carry_out(connection, work)
    if as_json:
        exits.put(json_line(run_object(run) | {"answer": answer}))
        return
    for name, value in _facts(run):
        exits.put(f"{name:<12}{visible_line(value, exits.MAX_LINE_CHARS)}")
    if answer is not None:
        exits.put("")
        exits.put(answer)


def cancel(connection: Connection, run_id: str, *, as_json: bool) -> None:
    """Cancel a run."""
    _put_state(carry_out(connection, lambda client: client.cancel_run(run_id)), as_json=as_json)


def resume(connection: Connection, run_id: str, *, as_json: bool) -> None:
    """Resume a run."""
    _put_state(carry_out(connection, lambda client: client.resume_run(run_id)), as_json=as_json)


def delete(connection: Connection, run_id: str, *, as_json: bool) -> None:
    """Delete a run."""
    carry_out(connection, lambda client: client.delete_run(run_id))
    if as_json:
        exits.put(json_line({"run_id": run_id, "deleted": True}))


def _put_state(run: Run, *, as_json: bool) -> None:
    if as_json:
        exits.put(json_line(run_object(run)))
    else:
        exits.put(_line(run))


def _line(run: Run) -> str:
    stands = run.outcome if run.is_over else run.state.value
    cost = words.dollars(run.confirmed.cost_microusd + run.unconfirmed.cost_microusd)
    return (
        f"{visible_line(run.run_id, _WIDEST)}  {run.created_at:%Y-%m-%d %H:%M}Z"
        f"  {visible_line(stands, _WIDEST):<17} {cost:>10}  {visible_line(run.question, _QUESTION_CHARS)}"
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    both = run.confirmed.plus(run.unconfirmed)
    used = f"{words.many(both.tokens, 'token')} · {words.dollars(both.cost_microusd)}"
    if any(run.unconfirmed):
        unconfirmed = (
            f"{words.many(run.unconfirmed.tokens, 'token')}, {words.dollars(run.unconfirmed.cost_microusd)}"
        )
        used += f" (of these unconfirmed: {unconfirmed})"
    facts = [
        ("run", run.run_id),
        ("state", f"{run.state.value}{f': {run.outcome}' if run.outcome else ''}"),
        ("error", run.error),
        ("question", run.question),
        ("context", run.context_id),
        ("model", run.options.model or ""),
        ("created", f"{run.created_at:%Y-%m-%d %H:%M:%S}Z"),
        ("started", f"{run.started_at:%Y-%m-%d %H:%M:%S}Z" if run.started_at else ""),
        ("ended", f"{run.ended_at:%Y-%m-%d %H:%M:%S}Z" if run.ended_at else ""),
        ("used", used),
        ("resumed", f"{run.resumed}" if run.resumed else ""),
        ("continues", run.continues),
    ]
    return [(name, value) for name, value in facts if value]
