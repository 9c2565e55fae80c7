"""What a command line changes of a tenant's rules. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from orchestrator.cli.amounts import Limit
from orchestrator.store.books import Quota, TenantRules


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleChanges:
    """None leaves a rule as it is; `Limit(None)` lifts a limit."""

    max_tokens_per_day: Limit | None = None
    max_cost_usd_per_day: Limit | None = None
    """In micro-dollars."""
    max_runs_per_day: Limit | None = None
    max_tokens_per_month: Limit | None = None
    max_cost_usd_per_month: Limit | None = None
    max_runs_per_month: Limit | None = None
    max_concurrent_runs: int | None = None
    max_queued_runs: int | None = None
    max_context_bytes: int | None = None
    models: tuple[str, ...] | None = None
    runtimes: tuple[str, ...] | None = None
    max_limits: Mapping[str, float | None] = field(default_factory=dict)
    """By name; None lifts one, and what is not named stays."""
    retention_days: Limit | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is changed."""
        return all(not getattr(self, item.name) and getattr(self, item.name) != () for item in fields(self))

    def applied_to(self, rules: TenantRules) -> TenantRules:
        """The rules with these changes."""
        limits = {**rules.max_limits, **self.max_limits}
        return replace(
            rules,
            per_day=_quota(
                rules.per_day, self.max_tokens_per_day, self.max_cost_usd_per_day, self.max_runs_per_day
            ),
            per_month=_quota(
                rules.per_month,
                self.max_tokens_per_month,
                self.max_cost_usd_per_month,
                self.max_runs_per_month,
            ),
            max_concurrent_runs=_or(self.max_concurrent_runs, rules.max_concurrent_runs),
            max_queued_runs=_or(self.max_queued_runs, rules.max_queued_runs),
            max_context_bytes=_or(self.max_context_bytes, rules.max_context_bytes),
            models=rules.models if self.models is None else self.models,
            runtimes=rules.runtimes if self.runtimes is None else self.runtimes,
            max_limits={name: most for name, most in limits.items() if most is not None},
            retention_days=_limit_or(self.retention_days, rules.retention_days),
        )


def _quota(quota: Quota, tokens: Limit | None, cost: Limit | None, runs: Limit | None) -> Quota:
    return Quota(
        max_tokens=_limit_or(tokens, quota.max_tokens),
        max_cost_microusd=_limit_or(cost, quota.max_cost_microusd),
        max_runs=_limit_or(runs, quota.max_runs),
    )


def _limit_or(given: Limit | None, otherwise: int | None) -> int | None:
    return otherwise if given is None else given.most


def _or(given: int | None, otherwise: int) -> int:
    return otherwise if given is None else given
