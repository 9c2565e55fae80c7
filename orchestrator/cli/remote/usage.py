"""`rlm usage`."""

from collections.abc import Mapping

from orchestrator.budget import Amounts
from orchestrator.cli import exits, words
from orchestrator.cli.json_line import json_line
from orchestrator.cli.remote.connection import Connection
from orchestrator.cli.remote.session import carry_out
from orchestrator.cli.remote.shapes import usage_object


def show(connection: Connection, *, as_json: bool) -> None:
    """A tenant's usage on stdout."""
    usage = carry_out(connection, lambda client: client.get_usage())
    if as_json:
        exits.put(json_line(usage_object(usage)))
        return
    exits.put(f"today       {_window(usage.day, usage.day_limit)} · {words.many(usage.runs_day, 'run')}")
    exits.put(f"this month  {_window(usage.month, usage.month_limit)}")
    most = f" of {usage.max_concurrent_runs:,}" if usage.max_concurrent_runs is not None else ""
    exits.put(f"live        {words.many(usage.live_runs, 'run')}{most}")
    if any(usage.held):
        exits.put(f"in flight   {words.many(usage.held.tokens, 'token')} at most")


def _window(used: Amounts, limit: Mapping[str, int]) -> str:
    tokens = words.many(used.tokens, "token")
    if "tokens" in limit:
        tokens += f" of {limit['tokens']:,}"
    cost = words.dollars(used.cost_microusd)
    if "cost_microusd" in limit:
        cost += f" of {words.dollars(limit['cost_microusd'])}"
    return f"{tokens} · {cost}"
