from collections.abc import Mapping
from dataclasses import replace

import pytest
from rlm_proto.v1 import run_pb2

from orchestrator.conversation import Dialect
from orchestrator.errors import InvalidRequestError, NotAllowedError
from orchestrator.ids import TenantId
from orchestrator.limits import RunLimits
from orchestrator.service.rules import (
    MAX_QUESTION_BYTES,
    NEEDED,
    Offer,
    check_idempotency_key,
    check_models,
    check_question,
    check_role,
    decide,
)
from orchestrator.store.books import Role, TenantRow, TenantRules

OFFER = Offer(model="big", sub_model="small", models_allowed=(), runtimes=("runc", "runsc"), max_sandboxes=16)
RULES = TenantRules()


def tenant(rules: TenantRules = RULES, tenant_id: str = "t1") -> TenantRow:
    return TenantRow(tenant_id=TenantId(tenant_id), name="acme", rules=rules, created_at=0.0)


US = tenant()


def test_every_method_of_the_service_has_its_role() -> None:
    methods = {method.name for method in run_pb2.DESCRIPTOR.services_by_name["RunService"].methods}
    assert set(NEEDED) == methods


def _may(method: str, role: Role) -> bool:
    try:
        check_role(method, role)
    except NotAllowedError:
        return False
    return True


@pytest.mark.parametrize("method", NEEDED)
def test_a_role_may_do_what_those_below_it_may(method: str) -> None:
    rising = [Role.READ, Role.RUN, Role.ADMIN]
    assert [role for role in rising if _may(method, role)] == rising[rising.index(NEEDED[method]) :]


def test_what_is_not_asked_for_is_the_default() -> None:
    decided = decide({}, US, OFFER)
    assert (decided.model, decided.sub_model, decided.runtime) == ("big", "small", "runc")
    assert decided.limits == RunLimits()
    assert decided.dialect is Dialect.TOOLS
    assert not decided.memoise


def test_the_model_that_is_asked_for_answers_sub_calls_too() -> None:
    assert decide({"model": "other"}, US, OFFER).sub_model == "other"
    assert decide({"sub_model": "other"}, US, OFFER).model == "big"


def test_what_was_decided_is_decided_again_the_same_way() -> None:
    asked: Mapping[str, object] = {
        "model": "m",
        "allow_models": ["x", "mine=y"],
        "runtime": "runsc",
        "dialect": "fences",
        "memoise": True,
        "max_tokens": 7,
        "max_depth": 0,
        "deadline_s": 12.5,
        "cell_timeout_s": 1_000.0,
    }
    decided = decide(asked, US, OFFER)
    assert decide(decided.as_options(), US, OFFER) == decided


def test_options_fit_into_the_message_of_the_protocol() -> None:
    options = decide({}, US, OFFER).as_options()
    assert {field.name for field in run_pb2.RunOptions.DESCRIPTOR.fields} == set(options)
    run_pb2.RunOptions(**options)  # type: ignore[arg-type] # by name


def test_the_tenants_maximum_counts_where_it_is_less() -> None:
    rules = TenantRules(max_limits={"max_tokens": 1_000, "deadline_s": 60.0, "max_calls": 10**9})
    limits = decide({"max_tokens": 5_000}, tenant(rules), OFFER).limits
    assert (limits.max_tokens, limits.deadline_s, limits.max_calls) == (1_000, 60.0, RunLimits().max_calls)
    assert isinstance(limits.max_tokens, int)
    assert decide({"max_tokens": 500}, tenant(rules), OFFER).limits.max_tokens == 500


@pytest.mark.parametrize(("sandboxes", "deepest"), [(1, 0), (2, 1), (9, 2)])
def test_no_chain_is_longer_than_what_the_tenant_may_have_of_sandboxes(sandboxes: int, deepest: int) -> None:
    us = tenant(replace(RULES, max_concurrent_sandboxes=sandboxes))
    assert decide({"max_depth": 2}, us, OFFER).limits.max_depth == deepest
    stricter = tenant(replace(RULES, max_concurrent_sandboxes=9, max_limits={"max_depth": 1}))
    assert decide({}, stricter, OFFER).limits.max_depth == 1


def test_the_clocks_of_a_cell_do_not_undercut_the_one_that_was_asked_for() -> None:
    limits = decide({"cell_timeout_s": 5_000.0}, US, OFFER).limits
    assert min(limits.cell_cpu_s, limits.cell_ceiling_s) >= 5_000.0


def test_a_depth_is_bounded_by_the_servers_sandboxes() -> None:
    small = Offer(model="m", sub_model="m", models_allowed=(), runtimes=("runc",), max_sandboxes=1)
    assert decide({}, US, small).limits.max_depth == 0
    with pytest.raises(InvalidRequestError, match="chain of 3 sandboxes"):
        decide({"max_depth": 2}, US, small)


@pytest.mark.parametrize(
    "options",
    [
        {"model": 7},
        {"model": "x" * 201},
        {"model": "a\x1b[2J"},
        {"allow_models": "abc"},
        {"allow_models": [""]},
        {"allow_models": ["m"] * 21},
        {"dialect": "smoke"},
        {"memoise": 1},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"max_tokens": 10**30},
        {"max_depth": -1},
        {"deadline_s": 0.0},
        {"deadline_s": float("nan")},
        {"deadline_s": float("inf")},
        {"deadline_s": "soon"},
        {"tenant_id": "somebody"},
    ],
)
def test_an_option_that_makes_no_sense_is_refused_by_name(options: Mapping[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        decide(options, US, OFFER)


def test_a_tenant_uses_the_models_of_its_patterns_only() -> None:
    rules = TenantRules(models=("claude-haiku-*",))
    check_models({"claude-haiku-5-5"}, rules, OFFER)
    with pytest.raises(NotAllowedError, match="claude-opus"):
        check_models({"claude-haiku-5-5", "claude-opus-5-5"}, rules, OFFER)
    check_models({"claude-opus-5-5"}, RULES, OFFER)


@pytest.mark.parametrize(
    "options",
    [
        {"model": "scripted:/etc/evil.py"},
        {"sub_model": "scripted:/etc/evil.py"},
        {"allow_models": ["scripted:/etc/evil.py"]},
        {"allow_models": ["mine=scripted:/etc/evil.py"]},
        {"model": "mine=scripted:/etc/evil.py"},
    ],
)
def test_no_client_names_a_program_of_the_servers_machine(options: Mapping[str, object]) -> None:
    with pytest.raises(NotAllowedError, match="scripted"):
        decide(options, US, OFFER)


def test_a_scripted_model_that_the_operator_names_is_served() -> None:
    offer = Offer(
        model="scripted:/srv/m.py",
        sub_model="scripted:/srv/m.py",
        models_allowed=(),
        runtimes=("runc",),
        max_sandboxes=4,
    )
    assert decide({}, US, offer).model == "scripted:/srv/m.py"
    check_models({"scripted:/srv/m.py"}, TenantRules(models=("claude-*",)), offer)
    with pytest.raises(NotAllowedError):
        decide({"model": "scripted:/srv/../srv/m.py"}, US, offer)


def test_a_runtime_is_one_that_the_server_offers_and_the_tenant_may_have() -> None:
    assert decide({}, tenant(TenantRules(runtimes=("runsc",))), OFFER).runtime == "runsc"
    with pytest.raises(NotAllowedError, match="runsc"):
        decide({"runtime": "runc"}, tenant(TenantRules(runtimes=("runsc",))), OFFER)
    only_runc = Offer(model="m", sub_model="m", models_allowed=(), runtimes=("runc",), max_sandboxes=4)
    with pytest.raises(NotAllowedError, match="none of the runtimes"):
        decide({}, tenant(TenantRules(runtimes=("runsc",))), only_runc)


@pytest.mark.parametrize("held", ["*", "t1"])
def test_a_tenant_that_is_held_to_gvisor_has_it_or_nothing(held: str) -> None:
    offer = replace(OFFER, held_to_gvisor=frozenset({held}))
    assert decide({}, US, offer).runtime == "runsc"
    with pytest.raises(NotAllowedError, match="runsc"):
        decide({"runtime": "runc"}, US, offer)
    with pytest.raises(NotAllowedError, match="none of the runtimes"):
        decide({}, US, replace(offer, runtimes=("runc",)))
    assert (decide({}, tenant(tenant_id="t2"), offer).runtime == "runc") is (held == "t1")


@pytest.mark.parametrize("question", ["", " \n", "x" * (MAX_QUESTION_BYTES + 1), "\ud800"])
def test_a_question_is_text_of_some_length(question: str) -> None:
    with pytest.raises(InvalidRequestError, match="question"):
        check_question(question)


@pytest.mark.parametrize("key", ["", "x" * 101, "a\nb", "\ud800", "a\0"])
def test_an_idempotency_key_can_be_shown(key: str) -> None:
    with pytest.raises(InvalidRequestError, match="idempotency_key"):
        check_idempotency_key(key)
