"""What is changed of a tenant's rules, and which changes make sense. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

from orchestrator.errors import InvalidRequestError
from orchestrator.limits import RunLimits
from orchestrator.store.books import Quota, TenantRules

MAX_PATTERNS = 100
MAX_PATTERN_CHARS = 200
MOST = 1_000_000_000_000_000
"""Of anything counted: more is a slip, and the database has no room for much more."""
_MOST_CONCURRENT_RUNS = 100_000
_MOST_CONCURRENT_SANDBOXES = 100_000
_MOST_QUEUED_RUNS = 10_000_000
_RUNTIMES = ("runc", "runsc")


class Limit(NamedTuple):
    """A limit that may be none: told apart from one that was not given."""

    most: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleChanges:
    """None leaves a rule as it is; `Limit(None)` lifts a limit."""

    max_tokens_per_day: Limit | None = None
    max_cost_microusd_per_day: Limit | None = None
    max_runs_per_day: Limit | None = None
    max_tokens_per_month: Limit | None = None
    max_cost_microusd_per_month: Limit | None = None
    max_runs_per_month: Limit | None = None
    max_concurrent_runs: int | None = None
    max_concurrent_sandboxes: Limit | None = None
    max_queued_runs: int | None = None
    max_context_bytes: int | None = None
    models: Sequence[str] | None = None
    """Empty for all that the server allows."""
    runtimes: Sequence[str] | None = None
    """Empty for both."""
    max_limits: Mapping[str, float | None] = field(default_factory=dict)
    """By name; None lifts one, and what is not named stays."""
    retention_days: Limit | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is changed."""
        return all(getattr(self, item.name) in (None, {}) for item in fields(self))

    def applied_to(self, rules: TenantRules) -> TenantRules:
        """The rules with these changes."""
        limits = {**rules.max_limits, **self.max_limits}
        return replace(
            rules,
            per_day=_quota(
                rules.per_day, self.max_tokens_per_day, self.max_cost_microusd_per_day, self.max_runs_per_day
            ),
            per_month=_quota(
                rules.per_month,
                self.max_tokens_per_month,
                self.max_cost_microusd_per_month,
                self.max_runs_per_month,
            ),
            max_concurrent_runs=_or(self.max_concurrent_runs, rules.max_concurrent_runs),
            max_concurrent_sandboxes=_limit_or(self.max_concurrent_sandboxes, rules.max_concurrent_sandboxes),
            max_queued_runs=_or(self.max_queued_runs, rules.max_queued_runs),
            max_context_bytes=_or(self.max_context_bytes, rules.max_context_bytes),
            models=rules.models if self.models is None else tuple(self.models),
            runtimes=rules.runtimes if self.runtimes is None else tuple(self.runtimes),
            max_limits={name: most for name, most in limits.items() if most is not None},
            retention_days=_limit_or(self.retention_days, rules.retention_days),
        )

    def check(self) -> None:
        """Raise unless every change makes sense.

        Raises:
            InvalidRequestError: One does not. The sentence names its field.
        """
        for item in fields(self):
            given = getattr(self, item.name)
            if isinstance(given, Limit) and given.most is not None:
                _check_range(item.name, given.most, 0, MOST)
        if self.max_concurrent_runs is not None:
            _check_range("max_concurrent_runs", self.max_concurrent_runs, 1, _MOST_CONCURRENT_RUNS)
        sandboxes = self.max_concurrent_sandboxes
        if sandboxes is not None and sandboxes.most is not None:
            _check_range("max_concurrent_sandboxes", sandboxes.most, 1, _MOST_CONCURRENT_SANDBOXES)
        if self.max_queued_runs is not None:
            _check_range("max_queued_runs", self.max_queued_runs, 0, _MOST_QUEUED_RUNS)
        if self.max_context_bytes is not None:
            _check_range("max_context_bytes", self.max_context_bytes, 1, MOST)
        _check_models(self.models or ())
        if not set(self.runtimes or ()) <= set(_RUNTIMES):
            raise InvalidRequestError(f"runtimes are {' and '.join(_RUNTIMES)}")
        known = {item.name for item in fields(RunLimits)}
        for name, most in self.max_limits.items():
            if name not in known:
                raise InvalidRequestError(f"max_limits has none of {', '.join(sorted(known))}")
            if most is not None and not (math.isfinite(most) and 0 <= most <= MOST):
                raise InvalidRequestError(f"max_limits: {name} must be from 0 to {MOST:,}")


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InvalidRequestError(f"{name} must be from {least:,} to {most:,}")


def _check_models(patterns: Sequence[str]) -> None:
    if len(patterns) > MAX_PATTERNS:
        raise InvalidRequestError(f"models has more than {MAX_PATTERNS} patterns")
    if not all(0 < len(one) <= MAX_PATTERN_CHARS and one.isprintable() for one in patterns):
        raise InvalidRequestError(f"a pattern of models is 1 to {MAX_PATTERN_CHARS} printable characters")


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
