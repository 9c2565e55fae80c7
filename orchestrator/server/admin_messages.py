"""Between the books' rows and admin.proto's messages. Pure."""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from rlm_proto.v1 import admin_pb2 as pb

from orchestrator.errors import InvalidRequestError
from orchestrator.store.books import KeyRow, Quota, Role, TenantRow, TenantRules
from orchestrator.store.rule_changes import Limit, RuleChanges

_ROLE: Mapping[Role, "pb.KeyRole.ValueType"] = {
    Role.READ: pb.KEY_ROLE_READ,
    Role.RUN: pb.KEY_ROLE_RUN,
    Role.ADMIN: pb.KEY_ROLE_ADMIN,
}
_ROLE_OF = {value: role for role, value in _ROLE.items()}
_LIMITS = (
    "max_tokens_per_day",
    "max_cost_microusd_per_day",
    "max_runs_per_day",
    "max_tokens_per_month",
    "max_cost_microusd_per_month",
    "max_runs_per_month",
    "retention_days",
    "max_concurrent_sandboxes",
)
_COUNTS = ("max_concurrent_runs", "max_queued_runs", "max_context_bytes")
_MAX_TOKEN_CHARS = 1_000


# --- To the client -------------------------------------------------------------------------------------


def tenant(row: TenantRow) -> pb.Tenant:
    """A tenant."""
    return pb.Tenant(
        tenant_id=row.tenant_id,
        name=row.name,
        rules=_rules(row.rules),
        created_at=_timestamp(row.created_at),
    )


def key(row: KeyRow) -> pb.Key:
    """A key, without the key."""
    return pb.Key(
        key_id=row.key_id,
        tenant_id=row.tenant_id,
        role=_ROLE[row.role],
        hint=row.hint,
        created_at=_timestamp(row.created_at),
        revoked_at=None if row.revoked_at is None else _timestamp(row.revoked_at),
    )


def page_token(last_name: str) -> str:
    """For the page behind the tenant of that name."""
    return base64.urlsafe_b64encode(last_name.encode()).decode()


def _rules(rules: TenantRules) -> pb.TenantRules:
    return pb.TenantRules(
        per_day=_quota(rules.per_day),
        per_month=_quota(rules.per_month),
        max_concurrent_runs=rules.max_concurrent_runs,
        max_queued_runs=rules.max_queued_runs,
        max_context_bytes=rules.max_context_bytes,
        models=rules.models,
        runtimes=rules.runtimes,
        max_limits=rules.max_limits,
        retention_days=rules.retention_days,
        max_concurrent_sandboxes=rules.max_concurrent_sandboxes,
    )


def _quota(quota: Quota) -> pb.Quota:
    return pb.Quota(
        max_tokens=quota.max_tokens, max_cost_microusd=quota.max_cost_microusd, max_runs=quota.max_runs
    )


def _timestamp(unix_s: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(round(unix_s * 1_000_000))
    return stamp


# --- From the client -----------------------------------------------------------------------------------


def role_of(given: "pb.KeyRole.ValueType") -> Role:
    """What a key is to be able to do.

    Raises:
        InvalidRequestError: It is not said, or there is no such role.
    """
    if given not in _ROLE_OF:
        raise InvalidRequestError("say which role the key is to have: read, run or admin")
    return _ROLE_OF[given]


def changes_of(message: pb.RuleChanges) -> RuleChanges:
    """What is set."""
    given: Any = message  # its types know the fields by name only
    limits: dict[str, Any] = {
        name: _limit_of(getattr(given, name)) for name in _LIMITS if given.HasField(name)
    }
    return RuleChanges(
        **limits,
        **{name: getattr(given, name) for name in _COUNTS if given.HasField(name)},
        models=tuple(message.models.names) if message.HasField("models") else None,
        runtimes=tuple(message.runtimes.names) if message.HasField("runtimes") else None,
        max_limits={
            name: number_of(one.most) if one.HasField("most") else None
            for name, one in message.max_limits.items()
        },
    )


def number_of(value: float) -> float:
    """The same number, as the command line and the database have it: whole where it is whole."""
    return int(value) if value.is_integer() else value


def page_of(token: str) -> str:
    """Behind which name a page begins.

    Raises:
        InvalidRequestError: The token is none of ours.
    """
    try:
        return base64.b64decode(token[:_MAX_TOKEN_CHARS], altchars=b"-_", validate=True).decode()
    except (ValueError, binascii.Error) as error:
        raise InvalidRequestError("page_token is none of this server's") from error


def _limit_of(limit: pb.Limit) -> Limit:
    return Limit(limit.most if limit.HasField("most") else None)
