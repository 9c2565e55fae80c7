"""AdminService's messages to values and back. Nothing here fails on what a server sends."""

from typing import Any

from rlm_proto.v1 import admin_pb2 as pb

from orchestrator.client.messages import time_from_wire
from orchestrator.client.values import Key, Tenant
from orchestrator.store.books import Quota, Role, TenantRules
from orchestrator.store.rule_changes import Limit, RuleChanges

_ROLE = {Role.READ: pb.KEY_ROLE_READ, Role.RUN: pb.KEY_ROLE_RUN, Role.ADMIN: pb.KEY_ROLE_ADMIN}
_ROLE_OF = {number: role for role, number in _ROLE.items()}


def role_to_wire(role: Role) -> pb.KeyRole.ValueType:
    """For a key to be."""
    return _ROLE[role]


def changes_to_wire(changes: RuleChanges) -> pb.RuleChanges:
    """Only what is changed is set."""
    limits: dict[str, Any] = {
        name: pb.Limit(most=given.most)
        for name in RuleChanges.__slots__
        if isinstance(given := getattr(changes, name), Limit)
    }
    return pb.RuleChanges(
        **limits,
        max_concurrent_runs=changes.max_concurrent_runs,
        max_queued_runs=changes.max_queued_runs,
        max_context_bytes=changes.max_context_bytes,
        models=None if changes.models is None else pb.Names(names=changes.models),
        runtimes=None if changes.runtimes is None else pb.Names(names=changes.runtimes),
        max_limits={name: pb.RunLimit(most=most) for name, most in changes.max_limits.items()},
    )


def tenant_from_wire(message: pb.Tenant) -> Tenant:
    """A tenant."""
    return Tenant(
        tenant_id=message.tenant_id,
        name=message.name,
        rules=_rules(message.rules),
        created_at=time_from_wire(message.created_at),
    )


def key_from_wire(message: pb.Key) -> Key:
    """A key. A role that this client does not know counts as the least one."""
    return Key(
        key_id=message.key_id,
        tenant_id=message.tenant_id,
        role=_ROLE_OF.get(message.role, Role.READ),
        hint=message.hint,
        created_at=time_from_wire(message.created_at),
        revoked_at=time_from_wire(message.revoked_at) if message.HasField("revoked_at") else None,
    )


def _rules(rules: pb.TenantRules) -> TenantRules:
    return TenantRules(
        per_day=_quota(rules.per_day),
        per_month=_quota(rules.per_month),
        max_concurrent_runs=rules.max_concurrent_runs,
        max_queued_runs=rules.max_queued_runs,
        models=tuple(rules.models),
        runtimes=tuple(rules.runtimes),
        # Whole where it is whole, as the command line and the database have it.
        max_limits={
            name: int(most) if most.is_integer() else most for name, most in rules.max_limits.items()
        },
        max_context_bytes=rules.max_context_bytes,
        retention_days=rules.retention_days if rules.HasField("retention_days") else None,
        max_concurrent_sandboxes=rules.max_concurrent_sandboxes
        if rules.HasField("max_concurrent_sandboxes")
        else None,
    )


def _quota(quota: pb.Quota) -> Quota:
    return Quota(
        max_tokens=quota.max_tokens if quota.HasField("max_tokens") else None,
        max_cost_microusd=quota.max_cost_microusd if quota.HasField("max_cost_microusd") else None,
        max_runs=quota.max_runs if quota.HasField("max_runs") else None,
    )
