"""Settings that concern the wall: none can take a part of it away (N03), and debugging is seen (N07)."""

import dataclasses

import pytest

from orchestrator.app import RunOptions
from orchestrator.config import SandboxSettings, Settings, read_settings
from orchestrator.errors import InvalidRequestError
from orchestrator.limits import RunLimits

_OPENS = (
    "network",
    "user",
    "privilege",
    "capab",
    "seccomp",
    "unconfined",
    "mount",
    "volume",
    "device",
    "env",
)


@pytest.mark.case("N03")
@pytest.mark.parametrize("settings", [Settings, SandboxSettings, RunOptions, RunLimits])
def test_no_setting_and_no_option_of_a_run_can_open_a_part_of_the_wall(settings: type) -> None:
    # What the provider process gets of the environment never reaches a sandbox.
    names = {item.name for item in dataclasses.fields(settings)} - {"provider_environment"}
    assert not [name for name in names if any(word in name for word in _OPENS)]


@pytest.mark.case("N03")
@pytest.mark.parametrize(
    "name",
    ["RLM_NETWORK", "RLM_SANDBOX_USER", "RLM_PRIVILEGED", "RLM_SECCOMP", "RLM_RUNTIME", "RLM_ALLOW_UNSAFE"],
)
def test_a_setting_that_would_open_it_does_not_exist_and_stops_the_process(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"unknown settings: {name}"):
        read_settings({"HOME": "/home/me", name: "1"})


@pytest.mark.case("N03")
@pytest.mark.parametrize("name", ["RLM_SANDBOX_MEMORY_MIB", "RLM_MAX_SANDBOXES"])
@pytest.mark.parametrize("value", ["0", "-1", "unlimited", "inf", "1e9"])
def test_no_limit_can_be_taken_away(name: str, value: str) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        read_settings({"HOME": "/", name: value})


@pytest.mark.case("N03")
def test_tenants_are_held_to_gvisor_by_name_or_all_of_them() -> None:
    assert read_settings({"HOME": "/"}).runsc_tenants == frozenset()
    listed = read_settings({"HOME": "/", "RLM_RUNSC_TENANTS": " acme, local ,,"})
    assert listed.runsc_tenants == {"acme", "local"}
    assert read_settings({"HOME": "/", "RLM_RUNSC_TENANTS": "*"}).runsc_tenants == {"*"}


@pytest.mark.case("N03")
@pytest.mark.parametrize("value", ["acme;local", "a b", "ac*", "\x1b[31m", "é", "-x"])
def test_a_list_of_tenants_that_says_something_else_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequestError, match="RLM_RUNSC_TENANTS must list ids"):
        read_settings({"HOME": "/", "RLM_RUNSC_TENANTS": f"acme,{value}"})


@pytest.mark.case("A16")
def test_known_bad_versions_warn_unless_they_are_to_refuse() -> None:
    assert not read_settings({"HOME": "/"}).refuse_known_bad_versions
    assert not read_settings({"HOME": "/", "RLM_KNOWN_BAD_VERSIONS": "warn"}).refuse_known_bad_versions
    assert read_settings({"HOME": "/", "RLM_KNOWN_BAD_VERSIONS": "refuse"}).refuse_known_bad_versions
    with pytest.raises(InvalidRequestError, match="must be warn or refuse, not 'ignore'"):
        read_settings({"HOME": "/", "RLM_KNOWN_BAD_VERSIONS": "ignore"})


@pytest.mark.case("N07")
def test_no_option_of_a_run_switches_debugging_on() -> None:
    words = ("debug", "trace", "verbos", "log")
    names = [item.name for kind in (RunOptions, RunLimits) for item in dataclasses.fields(kind)]
    assert not [name for name in names if any(word in name for word in words)]


@pytest.mark.case("N07")
@pytest.mark.parametrize(
    ("environment", "switches"),
    [
        ({}, ()),
        ({"GRPC_VERBOSITY": "NONE"}, ()),
        ({"GRPC_VERBOSITY": "error"}, ()),
        ({"GRPC_VERBOSITY": "debug"}, ("GRPC_VERBOSITY",)),
        ({"GRPC_TRACE": "all", "GRPC_VERBOSITY": "INFO"}, ("GRPC_TRACE", "GRPC_VERBOSITY")),
        ({"PYTHONASYNCIODEBUG": "1"}, ("PYTHONASYNCIODEBUG",)),
        ({"PYTHONDEVMODE": ""}, ()),
    ],
)
def test_debugging_that_the_operator_left_on_is_seen(
    environment: dict[str, str], switches: tuple[str, ...]
) -> None:
    assert tuple(read_settings({"HOME": "/", **environment}).debug_switches) == switches
