"""`rlm tenants` and `rlm keys`, on a database of their own."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from orchestrator.cli.main import app as rlm
from orchestrator.errors import InvalidRequestError, NotFoundError, StoreError
from orchestrator.store.books import AuditRow, Quota, Role, TenantRules
from orchestrator.store.database import open_database
from orchestrator.store.rule_changes import Limit, RuleChanges
from orchestrator.store.sql_audit import SqlAuditBook
from orchestrator.store.sql_tenants import SqlTenantBook


class Operator:
    """Types commands on the service's machine."""

    def __init__(self, state_dir: Path) -> None:
        self.file = state_dir / "service.db"
        self._environment = {"RLM_STATE_DIR": str(state_dir), "RLM_STORE": ""}

    def types(self, *words: object) -> Result:
        return CliRunner(env=self._environment).invoke(rlm, [str(word) for word in words])

    def does(self, *words: object) -> Any:
        """What the command printed, as an object."""
        result = self.types(*words, "--json")
        assert result.exit_code == 0, result.exception
        return json.loads(result.stdout)

    def whose(self, key: str) -> Role | None:
        """The role of a key, as the service sees it."""

        async def look() -> Role | None:
            async with open_database(f"sqlite:///{self.file}") as database:
                found = await SqlTenantBook(database).who_has(key)
                return None if found is None else found[1].role

        return asyncio.run(look())

    def audit(self) -> Sequence[AuditRow]:
        async def read() -> Sequence[AuditRow]:
            async with open_database(f"sqlite:///{self.file}") as database:
                return [row for _number, row in await SqlAuditBook(database).read()]

        return asyncio.run(read())


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    return Operator(tmp_path / "state")


def test_a_tenant_that_is_added_before_the_service_ever_ran_has_a_key_that_works(operator: Operator) -> None:
    made = operator.does("tenants", "add", "acme")
    assert set(made) == {"tenant_id", "api_key"}
    assert operator.whose(made["api_key"]) is Role.ADMIN
    assert operator.file.parent.stat().st_mode & 0o777 == 0o700


def test_a_tenant_has_the_rules_it_was_added_with_and_others_when_they_are_set(operator: Operator) -> None:
    operator.does(
        "tenants", "add", "acme", "--max-tokens-per-day", 1_000, "--max-cost-usd-per-month", "0.5",
        "--model", "claude-*", "--model", "other", "--max-limit", "max_depth=1", "--retention-days", 30,
    )  # fmt: skip
    (tenant,) = operator.does("tenants", "list")["tenants"]
    rules = tenant["rules"]
    assert rules["per_day"] == {"max_tokens": 1_000, "max_cost_microusd": None, "max_runs": None}
    assert rules["per_month"]["max_cost_microusd"] == 500_000
    assert rules["models"] == ["claude-*", "other"]
    assert rules["max_limits"] == {"max_depth": 1}
    changed = operator.does(
        "tenants", "set", "acme", "--max-tokens-per-day", "none", "--max-runs-per-day", 5, "--any-model",
        "--max-limit", "max_depth=none", "--max-limit", "max_turns=3", "--max-concurrent-runs", 2,
        "--max-concurrent-sandboxes", 6,
    )["rules"]  # fmt: skip
    assert changed["per_day"] == {"max_tokens": None, "max_cost_microusd": None, "max_runs": 5}
    assert changed["per_month"]["max_cost_microusd"] == 500_000
    assert changed["models"] == []
    assert changed["max_limits"] == {"max_turns": 3}
    assert (changed["max_concurrent_runs"], changed["retention_days"]) == (2, 30)
    assert changed["max_concurrent_sandboxes"] == 6
    line = operator.types("tenants", "list").stdout
    assert "acme  2 runs at once; 6 sandboxes at once; 5 runs a day; $0.5000 a month; max_turns 3; " in line
    assert "; kept for 30 days\n" in line


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((), "name something to change"),
        (("--max-tokens-per-day", "-1"), "neither a whole number"),
        (("--max-tokens-per-day", "1e6"), "neither a whole number"),
        (("--max-cost-usd-per-day", "much"), "is not an amount of US dollars"),
        (("--max-concurrent-runs", "0"), "greater than or equal to 1"),
        (("--runtime", "crun"), "'crun' is neither runc nor runsc"),
        (("--runtime", "runc", "--any-runtime"), "contradicts --any-runtime"),
        (("--max-limit", "max_fun=1"), "'max_fun' is none of max_tokens"),
        (("--max-limit", "max_turns"), "neither a whole number"),
    ],
)
def test_rules_that_make_no_sense_change_nothing(
    operator: Operator, options: tuple[str, ...], why: str
) -> None:
    result = operator.types("tenants", "set", "acme", *options)
    assert result.exit_code == 2
    assert why in " ".join(result.stderr.replace("│", " ").split())
    assert not operator.file.exists()


def test_changes_of_nothing_change_nothing_and_each_change_changes_its_own_rule() -> None:
    before = TenantRules(
        per_day=Quota(max_tokens=1, max_cost_microusd=2, max_runs=3),
        models=("m",),
        max_limits={"max_depth": 1},
    )
    assert RuleChanges().applied_to(before) == before
    assert RuleChanges().is_empty
    lifted = RuleChanges(max_tokens_per_day=Limit(None))
    assert not lifted.is_empty
    assert lifted.applied_to(before).per_day == Quota(max_tokens=None, max_cost_microusd=2, max_runs=3)
    assert not RuleChanges(models=()).is_empty
    assert RuleChanges(models=()).applied_to(before).models == ()
    assert RuleChanges(retention_days=Limit(0)).applied_to(before).retention_days == 0


def test_keys_are_made_listed_without_the_key_and_revoked(operator: Operator) -> None:
    first = operator.does("tenants", "add", "acme")
    made = operator.does("keys", "add", "acme", "--role", "read")
    assert made["tenant_id"] == first["tenant_id"]
    assert operator.whose(made["api_key"]) is Role.READ
    listed = operator.does("keys", "list", first["tenant_id"])["keys"]
    assert [key["role"] for key in listed] == ["admin", "read"]
    assert listed[1]["key_id"] == made["key_id"]
    assert listed[1]["hint"] == made["api_key"][-4:]
    assert made["api_key"] not in json.dumps(listed) + operator.types("keys", "list", "acme").stdout
    operator.does("keys", "revoke", "acme", made["key_id"])
    assert operator.whose(made["api_key"]) is None
    assert operator.whose(first["api_key"]) is Role.ADMIN
    assert "  revoked 20" in operator.types("keys", "list", "acme").stdout


def test_a_key_without_a_role_can_ask_and_not_delete(operator: Operator) -> None:
    operator.does("tenants", "add", "acme")
    assert operator.does("keys", "add", "acme")["role"] == "run"


def test_people_are_told_that_a_key_is_shown_once(operator: Operator) -> None:
    result = operator.types("tenants", "add", "acme")
    key = result.stdout.split()[-1]
    assert operator.whose(key) is Role.ADMIN
    assert result.stderr == "rlm: keep the key: it is stored as a hash, and not shown again\n"


def test_a_tenant_that_is_removed_is_gone_with_its_keys_and_its_name_is_free(operator: Operator) -> None:
    made = operator.does("tenants", "add", "acme")
    assert operator.does("tenants", "remove", "acme") == {"tenant_id": made["tenant_id"], "removed": True}
    assert operator.whose(made["api_key"]) is None
    assert operator.does("tenants", "list") == {"tenants": []}
    assert operator.does("tenants", "add", "acme")["tenant_id"] != made["tenant_id"]


def test_who_is_not_there_or_there_already_is_told(operator: Operator) -> None:
    operator.does("tenants", "add", "acme")
    for words, kind in (
        (("tenants", "add", "acme"), InvalidRequestError),
        (("tenants", "remove", "other"), NotFoundError),
        (("tenants", "set", "other", "--any-model"), NotFoundError),
        (("keys", "list", "other"), NotFoundError),
        (("keys", "revoke", "acme", "none"), NotFoundError),
        (("tenants", "list", "--store", "mysql://x"), StoreError),
    ):
        assert isinstance(operator.types(*words).exception, kind)


def test_all_that_an_operator_does_is_in_the_audit_log(operator: Operator) -> None:
    made = operator.does("tenants", "add", "acme")
    key = operator.does("keys", "add", "acme", "--role", "read")
    operator.does("keys", "revoke", "acme", key["key_id"])
    operator.does("tenants", "set", "acme", "--any-runtime")
    operator.does("tenants", "remove", "acme")
    rows = operator.audit()
    assert [(row.action, row.detail) for row in rows] == [
        ("AddTenant", ""),
        ("AddKey", "admin"),
        ("AddKey", "read"),
        ("RevokeKey", ""),
        ("SetRules", ""),
        ("RemoveTenant", ""),
    ]
    assert {row.actor for row in rows} == {"operator"}
    assert {row.tenant_id for row in rows} == {made["tenant_id"]}
    assert not any(made["api_key"] in str(row) for row in rows)


def test_operators_keys_are_made_listed_and_revoked_apart_from_tenants_keys(operator: Operator) -> None:
    operator.does("tenants", "add", "acme")
    made = operator.does("keys", "add", "--operator")
    assert made["api_key"].startswith("rlmop_")
    assert operator.whose(made["api_key"]) is None
    assert (made["tenant_id"], made["role"]) == (None, "operator")
    (listed,) = operator.does("keys", "list", "--operator")["keys"]
    assert (listed["key_id"], listed["role"], listed["revoked_at"]) == (made["key_id"], "operator", None)
    assert len(operator.does("keys", "list", "acme")["keys"]) == 1
    assert isinstance(operator.types("keys", "revoke", "acme", made["key_id"]).exception, NotFoundError)
    operator.does("keys", "revoke", made["key_id"], "--operator")
    assert "operator  …" in operator.types("keys", "list", "--operator").stdout
    assert "  revoked 20" in operator.types("keys", "list", "--operator").stdout
    assert [row.action for row in operator.audit()][2:] == ["AddOperatorKey", "RevokeOperatorKey"]
    assert not any(made["api_key"] in str(row) for row in operator.audit())


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("keys", "add"), "name a tenant, or --operator"),
        (("keys", "list"), "name a tenant, or --operator"),
        (("keys", "revoke", "k1"), "name a tenant, or --operator"),
        (("keys", "revoke", "acme", "k1", "k2"), "name one tenant and one key"),
        (("keys", "add", "acme", "--operator"), "is no tenant's"),
        (("keys", "add", "--operator", "--role", "read"), "an operator's key has none"),
        (("keys", "list", "--operator", "--server", "127.0.0.1:1"), "on the server's machine"),
        (("tenants", "list", "--store", "sqlite:///x", "--server", "127.0.0.1:1"), "contradicts --server"),
        (("tenants", "list", "--plaintext"), "goes with --server"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_opened(
    operator: Operator, words: tuple[str, ...], why: str
) -> None:
    result = CliRunner(env={"RLM_STATE_DIR": str(operator.file.parent), "RLM_API_KEY": "rlm_x"}).invoke(
        rlm, list(words)
    )
    assert result.exit_code == 2
    assert why in " ".join(result.stderr.replace("│", " ").split())
    assert not operator.file.exists()


def test_the_audit_log_is_read_in_order_from_any_entry_on_and_by_tenant(operator: Operator) -> None:
    acme = operator.does("tenants", "add", "acme")["tenant_id"]
    other = operator.does("tenants", "add", "other")["tenant_id"]
    operator.does("keys", "add", "acme", "--role", "read")
    entries = operator.does("audit")["entries"]
    assert [entry["number"] for entry in entries] == sorted(entry["number"] for entry in entries)
    assert {entry["tenant_id"] for entry in entries} == {acme, other}
    assert {entry["actor"] for entry in entries} == {"operator"}
    mine = operator.does("audit", "acme")["entries"]
    assert mine == [entry for entry in entries if entry["tenant_id"] == acme]
    assert mine[-1]["action"] == "AddKey"
    assert operator.does("audit", "--after", entries[0]["number"], "--limit", 1)["entries"] == entries[1:2]
    shown = operator.types("audit", "acme").stdout.splitlines()
    assert len(shown) == len(mine)
    assert "AddKey" in shown[-1]


def test_the_audit_log_of_a_removed_tenant_is_found_by_its_id_and_of_none_is_told(operator: Operator) -> None:
    gone = operator.does("tenants", "add", "gone")["tenant_id"]
    operator.does("tenants", "remove", "gone")
    assert operator.does("audit", gone)["entries"][-1]["action"] == "RemoveTenant"
    assert isinstance(operator.types("audit", "gone").exception, NotFoundError)
