"""What JSON says and is answered about tenants and keys. Names and meanings are those of admin.proto."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.server.http.forms import DEFAULT_PAGE, MAX_PAGE, time_of
from orchestrator.service.admin_port import AddedKey, AddedTenant
from orchestrator.store.books import KeyRow, Quota, Role, TenantRow, TenantRules
from orchestrator.store.rule_changes import MAX_PATTERNS, Limit, RuleChanges


class _Asked(BaseModel):
    # Strict, but for roles, which JSON has as text.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Given(BaseModel):
    model_config = ConfigDict(frozen=True)


_PER_DAY, _PER_MONTH = "In a day (UTC); null lifts it.", "In a month (UTC); null lifts it."


class RulesForm(_Asked):
    """What changes of a tenant's rules. What is not given stays."""

    max_tokens_per_day: int | None = Field(default=None, description=_PER_DAY)
    max_cost_microusd_per_day: int | None = Field(default=None, description=_PER_DAY)
    max_runs_per_day: int | None = Field(default=None, description=_PER_DAY)
    max_tokens_per_month: int | None = Field(default=None, description=_PER_MONTH)
    max_cost_microusd_per_month: int | None = Field(default=None, description=_PER_MONTH)
    max_runs_per_month: int | None = Field(default=None, description=_PER_MONTH)
    max_concurrent_runs: int = Field(default=0, description="Root runs that run at once; others wait.")
    max_concurrent_sandboxes: int | None = Field(
        default=None,
        description="Sandboxes at once over all servers, with the chains that its runs have reserved; what"
        " needs more waits. Null for all that a server has.",
    )
    max_queued_runs: int = Field(default=0, description="Root runs that may wait; one more is refused.")
    max_context_bytes: int = Field(default=0, description="All contexts that it keeps, together.")
    models: list[str] = Field(
        default=[],
        max_length=MAX_PATTERNS,
        description="Patterns of models it may name; an empty list for all that the server allows.",
    )
    runtimes: list[str] = Field(
        default=[], max_length=2, description="`runc`, `runsc`; an empty list for both."
    )
    max_limits: dict[str, float | None] = Field(
        default={},
        max_length=20,
        description="What each run may have at most, by the names of `OptionsForm`; null lifts one, and those"
        " that are not named stay.",
    )
    retention_days: int | None = Field(
        default=None, description="Ended runs and unused contexts go after so many; null for never."
    )

    def changes(self) -> RuleChanges:
        """What was given."""
        given = self.model_fields_set
        kept: dict[str, Any] = {name: getattr(self, name) for name in given & _PLAIN}
        liftable = given - _PLAIN - {"max_limits"}
        limits: dict[str, Any] = {name: Limit(getattr(self, name)) for name in liftable}
        numbers = {
            name: int(most) if most is not None and most.is_integer() else most
            for name, most in self.max_limits.items()
        }
        return RuleChanges(**kept, **limits, max_limits=numbers)


_PLAIN = {"max_concurrent_runs", "max_queued_runs", "max_context_bytes", "models", "runtimes"}
"""What is no limit that can be lifted."""


class AddTenantForm(_Asked):
    """A tenant to be."""

    name: str = Field(description="1 to 100 printable characters; no other tenant's.")
    rules: RulesForm = Field(default=RulesForm(), description="Changes of what a tenant has by default.")


class AddKeyForm(_Asked):
    """A key to be."""

    role: Role = Field(strict=False, description="What it may do.")


class TenantsQuery(BaseModel):
    """Paging."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    page_size: int = Field(default=DEFAULT_PAGE, ge=1, le=MAX_PAGE)
    page_token: str | None = Field(default=None, description="From the page before.")


class QuotaReply(_Given):
    """What a tenant may use in a day or a month (UTC); null is no limit."""

    max_tokens: int | None
    max_cost_microusd: int | None
    max_runs: int | None

    @classmethod
    def of(cls, quota: Quota) -> "QuotaReply":
        """From our own."""
        return cls(
            max_tokens=quota.max_tokens, max_cost_microusd=quota.max_cost_microusd, max_runs=quota.max_runs
        )


class RulesReply(_Given):
    """What a tenant may do."""

    per_day: QuotaReply
    per_month: QuotaReply
    max_concurrent_runs: int
    max_concurrent_sandboxes: int | None
    max_queued_runs: int
    models: Sequence[str]
    runtimes: Sequence[str]
    max_limits: Mapping[str, int | float]
    max_context_bytes: int
    retention_days: int | None

    @classmethod
    def of(cls, rules: TenantRules) -> "RulesReply":
        """From our own."""
        return cls(
            per_day=QuotaReply.of(rules.per_day),
            per_month=QuotaReply.of(rules.per_month),
            max_concurrent_runs=rules.max_concurrent_runs,
            max_concurrent_sandboxes=rules.max_concurrent_sandboxes,
            max_queued_runs=rules.max_queued_runs,
            models=list(rules.models),
            runtimes=list(rules.runtimes),
            max_limits=dict(rules.max_limits),
            max_context_bytes=rules.max_context_bytes,
            retention_days=rules.retention_days,
        )


class TenantReply(_Given):
    """A tenant."""

    tenant_id: str
    name: str
    rules: RulesReply
    created_at: str

    @classmethod
    def of(cls, row: TenantRow) -> "TenantReply":
        """From a row."""
        return cls(
            tenant_id=row.tenant_id,
            name=row.name,
            rules=RulesReply.of(row.rules),
            created_at=time_of(row.created_at),
        )


class TenantsReply(_Given):
    """A page of tenants, by name."""

    tenants: Sequence[TenantReply]
    next_page_token: str = Field(description="Empty after the last.")


class KeyReply(_Given):
    """A key of a tenant, without the key."""

    key_id: str
    tenant_id: str
    role: Role
    hint: str = Field(description="The key's last four characters.")
    created_at: str
    revoked_at: str | None = Field(description="Null while it opens.")

    @classmethod
    def of(cls, row: KeyRow) -> "KeyReply":
        """From a row."""
        return cls(
            key_id=row.key_id,
            tenant_id=row.tenant_id,
            role=row.role,
            hint=row.hint,
            created_at=time_of(row.created_at),
            revoked_at=None if row.revoked_at is None else time_of(row.revoked_at),
        )


class KeysReply(_Given):
    """A tenant's keys, oldest first, revoked ones too."""

    keys: Sequence[KeyReply]


class AddedKeyReply(_Given):
    """A key that was just made."""

    key: KeyReply
    api_key: str = Field(
        repr=False, description="The key itself. It is stored as a hash, and not told again."
    )

    @classmethod
    def of(cls, added: AddedKey) -> "AddedKeyReply":
        """From our own."""
        return cls(key=KeyReply.of(added.key), api_key=added.api_key)


class AddedTenantReply(_Given):
    """A tenant that was just made, and its first key, of the role admin."""

    tenant: TenantReply
    key: KeyReply
    api_key: str = Field(
        repr=False, description="The key itself. It is stored as a hash, and not told again."
    )

    @classmethod
    def of(cls, added: AddedTenant) -> "AddedTenantReply":
        """From our own."""
        return cls(
            tenant=TenantReply.of(added.tenant),
            key=KeyReply.of(added.first.key),
            api_key=added.first.api_key,
        )
