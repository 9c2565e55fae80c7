from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sandbox.engine_facts import read_facts
from orchestrator.sandbox.known_bad import Component, table
from orchestrator.sandbox.preflight import (
    HostFacts,
    Objection,
    address_objection,
    objections,
    runtime_objection,
    sentence,
    state_dir_objection,
)
from orchestrator.visible import visible_line
from tests.unit.sandbox import machines

HOST = HostFacts(
    core_pattern="core", open_files=65_536, components=(Component(name="kernel", version="6.12.90"),)
)


def judged(
    info: Mapping[str, Any] | None = None,
    version: Mapping[str, Any] | None = None,
    host: HostFacts | None = HOST,
    *,
    runtime: str | None = None,
    refuse_known_bad: bool = False,
) -> tuple[Objection, ...]:
    facts = read_facts(info or machines.info(), version or machines.version())
    return objections(facts, host, holes=table(), refuse_known_bad=refuse_known_bad, runtime=runtime)


def refused(found: tuple[Objection, ...]) -> list[str]:
    return [objection.name for objection in found if objection.refuses]


def test_nothing_speaks_against_a_healthy_machine() -> None:
    assert judged() == ()


@pytest.mark.case("A13")
@pytest.mark.parametrize(
    ("lacking", "name"),
    [
        ({"SecurityOptions": ["name=apparmor"]}, "seccomp"),
        ({"SecurityOptions": None}, "seccomp"),
        ({"MemoryLimit": False}, "memory limit"),
        ({"SwapLimit": False}, "swap limit"),
        ({"PidsLimit": False}, "pids limit"),
        ({"CpuCfsQuota": False}, "cpu quota"),
        ({"CpuCfsPeriod": False}, "cpu period"),
        ({"CgroupDriver": "none"}, "cgroup driver"),
        ({"OSType": "windows"}, "engine system"),
    ],
)
def test_a_missing_part_of_the_wall_refuses_by_name_and_says_what_to_do(
    lacking: Mapping[str, Any], name: str
) -> None:
    found = judged(machines.info(**lacking))
    assert refused(found) == [name]
    assert found[0].what_to_do
    assert sentence(found[:1]).startswith(f"{name}: ")


@pytest.mark.case("A13")
@pytest.mark.parametrize("control", ["MemoryLimit", "SwapLimit", "PidsLimit", "CpuCfsQuota", "CpuCfsPeriod"])
@pytest.mark.parametrize("odd", [None, 1, "true", [True], {}])
def test_whatever_is_not_plainly_there_is_missing(control: str, odd: object) -> None:
    assert refused(judged(machines.info(**{control: odd})))


@pytest.mark.case("A13")
@pytest.mark.parametrize("answer", [None, [], "no", {}, {"Runtimes": [], "SecurityOptions": {"name": 1}}])
def test_an_engine_that_says_nothing_is_refused_whole(answer: object) -> None:
    facts = read_facts(answer, answer)
    found = objections(facts, None, holes=table(), refuse_known_bad=False)
    assert {"seccomp", "memory limit", "swap limit", "pids limit", "cpu quota"} <= set(refused(found))
    assert runtime_objection("runc", facts)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.case("A13")
@given(answers=st.dictionaries(st.sampled_from(sorted(machines.info())), _JSON), version=_JSON)
def test_no_answer_of_an_engine_breaks_the_judging_or_reaches_a_terminal(
    answers: dict[str, Any], version: object
) -> None:
    facts = read_facts({**machines.info(), **answers}, version)
    found = objections(facts, HOST, holes=table(), refuse_known_bad=True)
    missing = runtime_objection("runsc", facts)
    for objection in (*found, *([missing] if missing else [])):
        assert visible_line(objection.described, 10_000) == objection.described


@pytest.mark.case("A13", "A14")
def test_a_runtime_is_there_under_exactly_its_name_or_refused() -> None:
    facts = read_facts(machines.info(Runtimes={"runc": {}, "runsc-kvm": {}}), machines.version())
    assert runtime_objection("runc", facts) is None
    missing = runtime_objection("runsc", facts)
    assert missing is not None
    assert missing.refuses
    assert missing.detail == "the engine has no runtime 'runsc'; it has runc, runsc-kvm"


# --- Versions ------------------------------------------------------------------------------------------


@pytest.mark.case("A16")
def test_a_version_with_a_known_hole_is_named_and_warns() -> None:
    (found,) = judged(version=machines.version(runc="1.1.11"))
    assert (found.name, found.refuses) == ("runc version", False)
    assert "CVE-2024-21626" in found.detail
    assert "1.1.11" in found.detail


@pytest.mark.case("A16", "A13")
def test_a_version_with_a_known_hole_refuses_where_the_settings_say_so() -> None:
    assert refused(judged(version=machines.version(runc="1.1.11"), refuse_known_bad=True)) == ["runc version"]


@pytest.mark.case("A16")
@pytest.mark.parametrize(
    ("component", "version"),
    [
        ("kernel", "5.15.24"),
        ("runsc", "release-20221219.0"),
        ("grpcio", "1.62.1"),
        ("protobuf", "5.29.4"),
    ],
)
def test_versions_of_the_host_are_judged_too(component: str, version: str) -> None:
    host = replace(HOST, components=(Component(name=component, version=version),))
    assert [found.name for found in judged(host=host)] == [f"{component} version"]


@pytest.mark.case("A16")
def test_an_engine_that_is_old_enough_is_named() -> None:
    (found,) = judged(machines.info(ServerVersion="20.10.5"), machines.version(Engine="20.10.5"))
    assert found.name == "engine version"
    assert "CVE-2021-41091, CVE-2022-24769" in found.detail


@pytest.mark.case("A16")
def test_only_the_runtime_that_is_asked_for_is_judged() -> None:
    host = replace(HOST, components=(Component(name="runsc", version="release-20221219.0"),))
    version = machines.version(runc="1.1.11")
    assert [found.name for found in judged(None, version, host, runtime="runc")] == ["runc version"]
    assert [found.name for found in judged(None, version, host, runtime="runsc")] == ["runsc version"]


@pytest.mark.case("A16")
def test_a_distribution_that_hides_the_version_is_said_to() -> None:
    host = replace(HOST, components=(Component(name="kernel", version=""),))
    (found,) = judged(host=host, refuse_known_bad=True)
    assert (found.name, found.refuses) == ("kernel number", False)


@pytest.mark.case("A16")
def test_debians_engine_gives_the_versions_of_its_packages() -> None:
    packages = {"containerd": "1.6.20~ds1-1+deb12u3", "runc": "1.1.5+ds1-1+deb12u1"}
    version = {
        "Components": [
            {"Name": "containerd", "Version": "1.6.20~ds1", "Details": {"GitCommit": packages["containerd"]}},
            {"Name": "runc", "Version": "1.1.5+ds1", "Details": {"GitCommit": packages["runc"]}},
        ]
    }
    facts = read_facts(machines.info(), version)
    assert {one.name: one.version for one in facts.components[1:]} == packages


def test_an_engine_that_does_not_list_components_gives_commits() -> None:
    info = machines.info(RuncCommit={"ID": "v1.2.5-0-g59923ef"}, ContainerdCommit={"ID": "05044ec0a9a7"})
    facts = read_facts(info, {})
    assert {one.name: one.version for one in facts.components} == {
        "engine": "29.6.0",
        "containerd": "",
        "runc": "v1.2.5-0-g59923ef",
    }


# --- Host, address, state directory --------------------------------------------------------------------


@pytest.mark.case("C10")
def test_core_dumps_that_are_piped_to_a_program_are_told() -> None:
    (found,) = judged(host=replace(HOST, core_pattern="|/usr/share/apport/apport -p%p \x1b[31m"))
    assert (found.name, found.refuses) == ("core dumps", False)
    assert "/usr/share/apport/apport" in found.detail


@pytest.mark.parametrize(
    ("host", "name"),
    [
        (replace(HOST, same_page_merging=True), "page merging"),
        (replace(HOST, unprivileged_bpf=True), "unprivileged bpf"),
        (replace(HOST, open_files=1_024), "open files"),
    ],
)
def test_what_weakens_the_wall_warns(host: HostFacts, name: str) -> None:
    assert [(found.name, found.refuses) for found in judged(host=host)] == [(name, False)]


def test_a_machine_without_apparmor_and_selinux_warns() -> None:
    (found,) = judged(machines.info(SecurityOptions=["name=seccomp,profile=default"]))
    assert (found.name, found.refuses) == ("access control", False)


def test_what_refuses_comes_first() -> None:
    found = judged(machines.info(SecurityOptions=[], PidsLimit=False))
    assert [objection.refuses for objection in found] == sorted(
        (objection.refuses for objection in found), reverse=True
    )


@pytest.mark.case("N02", "N03")
@pytest.mark.parametrize(
    "address", ["tcp://10.0.0.1:2375", "tcp://127.0.0.1:2375", "http://h:1", "h:2375", "fd://"]
)
def test_an_engine_asked_in_the_clear_over_a_network_is_refused(address: str) -> None:
    objection = address_objection(address, verified_tls=False)
    assert objection is not None
    assert objection.refuses


@pytest.mark.case("N02")
@pytest.mark.parametrize(
    "address", ["", "unix:///run/docker.sock", "http+unix:///run/docker.sock", "ssh://me@h"]
)
def test_an_engine_behind_a_local_socket_is_fine(address: str) -> None:
    assert address_objection(address, verified_tls=False) is None


@pytest.mark.case("N02")
def test_an_engine_that_proves_who_it_is_is_fine() -> None:
    assert address_objection("tcp://10.0.0.1:2376", verified_tls=True) is None


@pytest.mark.case("N03")
@pytest.mark.parametrize(
    ("mode", "owner_uid", "refuses"),
    [
        (0o40700, 1000, False),
        (0o40755, 1000, False),
        (0o40755, 0, False),
        (0o40770, 1000, True),
        (0o41777, 0, True),
        (0o40700, 1001, True),
    ],
)
def test_a_state_directory_that_others_can_change_is_refused(
    mode: int, owner_uid: int, refuses: bool
) -> None:
    objection = state_dir_objection("/state", mode=mode, owner_uid=owner_uid, own_uid=1000)
    assert (objection is not None) is refuses
