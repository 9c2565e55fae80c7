import pytest

from orchestrator.errors import InvalidRequestError
from orchestrator.ids import TenantId
from orchestrator.sandbox.runtimes import runtime_for

ACME, LOCAL = TenantId("acme"), TenantId("local")


def test_without_a_wish_a_run_gets_runc() -> None:
    assert runtime_for(LOCAL, None, held_to_gvisor=frozenset()) == "runc"


@pytest.mark.case("A14")
def test_who_asks_for_gvisor_gets_it() -> None:
    assert runtime_for(LOCAL, "runsc", held_to_gvisor=frozenset()) == "runsc"


@pytest.mark.case("A14", "N03")
@pytest.mark.parametrize("held", [{"acme"}, {"*"}, {"other", "acme"}])
def test_a_tenant_that_is_held_to_gvisor_gets_it_or_nothing(held: set[str]) -> None:
    assert runtime_for(ACME, None, held_to_gvisor=held) == "runsc"
    assert runtime_for(ACME, "runsc", held_to_gvisor=held) == "runsc"
    with pytest.raises(InvalidRequestError, match="holds the tenant 'acme' to gVisor"):
        runtime_for(ACME, "runc", held_to_gvisor=held)


def test_other_tenants_are_not_held() -> None:
    assert runtime_for(LOCAL, "runc", held_to_gvisor={"acme"}) == "runc"
    assert runtime_for(LOCAL, None, held_to_gvisor={"acme"}) == "runc"


@pytest.mark.case("N03")
@pytest.mark.parametrize("runtime", ["", "crun", "RUNSC", "io.containerd.runc.v2", "/usr/bin/true"])
def test_no_other_runtime_can_be_named(runtime: str) -> None:
    with pytest.raises(InvalidRequestError, match="runtime must be runc or runsc"):
        runtime_for(LOCAL, runtime, held_to_gvisor=frozenset())
