"""The windows of time that a tenant's quotas count in. Pure."""

from collections.abc import Mapping
from datetime import UTC, datetime

from orchestrator.budget import UNLIMITED
from orchestrator.errors import BudgetExceededError
from orchestrator.store.books import Quota, TenantRules, Used


def day_of(now: float) -> str:
    """The name of the day (UTC) that a Unix time falls into."""
    return datetime.fromtimestamp(now, UTC).strftime("day:%Y-%m-%d")


def month_of(now: float) -> str:
    """The name of the month (UTC) that a Unix time falls into."""
    return datetime.fromtimestamp(now, UTC).strftime("month:%Y-%m")


def windows(rules: TenantRules, now: float) -> Mapping[str, Quota]:
    """The windows that now falls into, with the tenant's quotas."""
    return {day_of(now): rules.per_day, month_of(now): rules.per_month}


def check_not_used_up(used: Used, quota: Quota) -> None:
    """Raise when a window has nothing left to run on. Runs are counted where they are created.

    Raises:
        BudgetExceededError: Tokens or dollars are used up.
    """
    left = {
        "tokens": _left(quota.max_tokens, used.amounts.tokens),
        "cost_microusd": _left(quota.max_cost_microusd, used.amounts.cost_microusd),
    }
    if not all(left.values()):
        raise BudgetExceededError("tenant", dict.fromkeys(left, 1), left)


def _left(limit: int | None, used: int) -> int:
    return UNLIMITED if limit is None else max(0, limit - used)
