"""Rules of tenants on every way in: no field is forgotten, and none means something else on the way."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from pydantic import BaseModel
from rlm_proto.v1 import admin_pb2 as pb

from orchestrator.client import admin_messages as clients
from orchestrator.errors import InvalidRequestError
from orchestrator.ids import TenantId
from orchestrator.server import admin_messages as servers
from orchestrator.server.http.admin_forms import RulesForm, RulesReply
from orchestrator.store.books import Quota, Role, TenantRow, TenantRules
from orchestrator.store.rule_changes import Limit, RuleChanges

FULL = RuleChanges(
    **{
        item.name: Limit(number)
        for number, item in enumerate(fields(RuleChanges), start=1)
        if "Limit" in str(item.type)
    },
    max_concurrent_runs=2,
    max_queued_runs=0,
    max_context_bytes=5,
    models=("a-*", "b"),
    runtimes=("runc",),
    max_limits={"max_depth": 1, "deadline_s": 2.5, "max_turns": None},
)


def test_every_rule_and_every_change_is_in_the_protos_and_in_the_forms() -> None:
    rules, changes = ({item.name for item in fields(kind)} for kind in (TenantRules, RuleChanges))
    assert {field.name for field in pb.TenantRules.DESCRIPTOR.fields} == rules
    assert {field.name for field in pb.RuleChanges.DESCRIPTOR.fields} == changes
    forms: tuple[tuple[type[BaseModel], set[str]], ...] = ((RulesReply, rules), (RulesForm, changes))
    for form, names in forms:
        assert set(form.model_fields) == names
    assert {field.name for field in pb.Quota.DESCRIPTOR.fields} == {item.name for item in fields(Quota)}


@pytest.mark.parametrize("name", [item.name for item in fields(RuleChanges)])
def test_a_change_arrives_as_it_was_sent_and_alone(name: str) -> None:
    given: dict[str, Any] = {name: getattr(FULL, name)}
    one = RuleChanges(**given)
    assert not one.is_empty
    one.check()
    assert servers.changes_of(clients.changes_to_wire(one)) == one
    value = getattr(one, name)
    said = json.dumps({name: value.most if isinstance(value, Limit) else value})
    arrived: Any = RulesForm.model_validate_json(said).changes()
    assert all(
        (list(getattr(arrived, item.name)) if isinstance(was, tuple) else getattr(arrived, item.name))
        == (list(was) if isinstance(was, tuple) else was)
        for item in fields(RuleChanges)
        for was in [getattr(one, item.name)]
    )


def test_lifting_a_limit_is_not_leaving_it() -> None:
    lifted = RuleChanges(max_tokens_per_day=Limit(None), models=(), retention_days=Limit(None))
    assert servers.changes_of(clients.changes_to_wire(lifted)) == lifted
    form = RulesForm.model_validate_json('{"max_tokens_per_day": null, "models": [], "retention_days": null}')
    assert form.changes() == replace(lifted, models=[])
    assert servers.changes_of(clients.changes_to_wire(RuleChanges())).is_empty
    assert RulesForm().changes().is_empty


def test_rules_arrive_as_they_are() -> None:
    for rules in (TenantRules(), FULL.applied_to(TenantRules())):
        row = TenantRow(tenant_id=TenantId("t1"), name="Anna", rules=rules, created_at=1.5)
        there = clients.tenant_from_wire(servers.tenant(row))
        assert there.rules == rules
        assert isinstance(there.rules.max_limits.get("max_depth", 1), int)
        assert there.created_at.timestamp() == 1.5


def test_roles_arrive_as_they_are_and_others_are_refused() -> None:
    for role in Role:
        assert servers.role_of(clients.role_to_wire(role)) is role
    with pytest.raises(InvalidRequestError):
        servers.role_of(pb.KEY_ROLE_UNSPECIFIED)


@pytest.mark.parametrize("token", ["%", "a", "\u00fc", "=" * 2_000, "/w=="])
def test_a_token_that_no_page_came_with_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequestError):
        servers.page_of(token)
    assert servers.page_of(servers.page_token("Anna & Söhne")) == "Anna & Söhne"
