"""Judges without a sandbox: what they make of facts that are missing, wrong or those of an open door.

That each sees a real open door is shown in tests/security/controls, that they are closed in test_probes.
"""

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.probes import container, kernel, network, storage
from orchestrator.probes.calls import CLOSED, LEFT_OUT, MEANINGFUL, PASSES, allowed, named, numbers, sweep
from orchestrator.probes.finding import Differs, Finding, Probe, Verdict, find, read_facts
from orchestrator.probes.host import Host, Process, file_hashes, listening, read_process
from tests.security.posture.golden import RESOURCES

PROBES = (*container.PROBES, *storage.PROBES, *kernel.PROBES, *network.PROBES)
HOST = Host(
    runtime="runc",
    machine="x86_64",
    release="6.1.0",
    namespaces=dict.fromkeys(("cgroup", "ipc", "mnt", "net", "pid", "user", "uts"), "host"),
    uid=0,
    resources=RESOURCES,
    inspected={"Config": {"User": "200000:200000", "Env": []}, "HostConfig": {}, "Mounts": []},
    sandbox=Process(status={}, namespaces={}, command="", cgroup={}),
    arrived={"127.0.0.1 5": 0},
    context_changed=False,
    core_pattern="core",
)


def found(judged: list[str | Differs], *, runtime: str = "runc") -> Finding:
    probe = Probe("A01", "a door is closed", "identity", lambda _facts, _host: judged)
    return find(probe, {}, replace(HOST, runtime=runtime))


def test_nothing_found_means_closed() -> None:
    assert found([]).verdict is Verdict.CLOSED
    assert found([]).ok


def test_what_is_open_outweighs_what_differs() -> None:
    finding = found(["a socket", Differs("of gVisor's own"), "a file"], runtime="runsc")
    assert (finding.verdict, finding.detail) == (Verdict.OPEN, "a socket; a file")
    assert not finding.ok


def test_what_only_differs_is_told_and_is_no_failure() -> None:
    finding = found([Differs("of gVisor's own")], runtime="runsc")
    assert (finding.verdict, finding.detail, finding.ok) == (Verdict.DIFFERS, "of gVisor's own", True)


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.title)
@pytest.mark.parametrize("facts", [{}, {"calls": 3, "answers": [], "mounts": None}], ids=["none", "odd"])
def test_a_probe_without_its_facts_is_never_closed(probe: Probe, facts: dict[str, object]) -> None:
    assert not find(probe, facts, HOST).ok


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.title)
def test_a_probe_that_did_not_run_says_why(probe: Probe) -> None:
    finding = find(probe, "the cell was killed", HOST)
    assert (finding.verdict, finding.detail) == (Verdict.DID_NOT_RUN, "the cell was killed")


def test_a_host_that_cannot_be_read_is_no_closed_door() -> None:
    (probe,) = (each for each in PROBES if each.case == "A03")
    finding = find(probe, {"seccomp": "2"}, replace(HOST, sandbox=None))
    assert finding.verdict is Verdict.DID_NOT_RUN
    assert "as root" in finding.detail


@pytest.mark.parametrize(
    "printed",
    [
        "",
        "no JSON",
        '{"id":"identity"}',
        '{"id":"identity","ran":1}',
        '{"id":"mounts","ran":true}',
        "[]",
        '{"id":"identity","ran":true}\n{"id":"identity","ran":true}',
    ],
)
def test_anything_but_one_line_that_says_that_it_ran_is_refused(printed: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of whatever kind
        read_facts("identity", printed)


@pytest.mark.parametrize("answer", ["EFAULT", "EINVAL", "EBADF", "open", "SIGSEGV"])
def test_an_answer_of_the_kernels_own_means_that_it_was_reached(answer: str) -> None:
    (probe,) = (each for each in PROBES if each.title == "no keyring")
    closed = dict.fromkeys(CLOSED, "EPERM")
    assert find(probe, {"calls": closed}, HOST).verdict is Verdict.CLOSED
    finding = find(probe, {"calls": closed | {"keyctl": answer}}, HOST)
    assert (finding.verdict, finding.detail) == (Verdict.OPEN, f"keyctl: {answer}")


def test_one_connection_to_the_host_opens_a_door_whatever_the_guest_says() -> None:
    (probe,) = (each for each in PROBES if each.case == "D01")
    facts = {"tcp": {"127.0.0.1:5": "EPERM"}, "udp": {"127.0.0.1:5": "EPERM"}}
    assert find(probe, facts, HOST).verdict is Verdict.CLOSED
    reached = replace(HOST, arrived={"127.0.0.1 5": 1})
    assert find(probe, facts, reached).verdict is Verdict.OPEN


def test_a_crash_handler_of_the_hosts_is_an_open_door() -> None:
    (probe,) = (each for each in PROBES if each.case == "C10")
    facts = {"crash": "SIGABRT", "core_limit": [0, 0]}
    assert find(probe, facts, HOST).verdict is Verdict.CLOSED
    assert find(probe, facts, replace(HOST, core_pattern="|/usr/bin/handler")).verdict is Verdict.OPEN


# --- System calls --------------------------------------------------------------------------------------


def test_every_named_call_has_a_number_where_the_architecture_has_the_call() -> None:
    assert len(named("x86_64")) == len(CLOSED) + len(PASSES)
    assert len(named("aarch64")) > 70


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_sweep_makes_every_call_but_those_that_are_left_out(machine: str) -> None:
    swept = {number for number, _ in sweep(machine)}
    left_out = {name for name, number in numbers(machine).items() if number not in swept}
    assert left_out <= LEFT_OUT.keys()
    assert max(swept) > max(numbers(machine).values()) + 100
    assert numbers(machine).keys() >= MEANINGFUL.keys()


def test_an_unknown_architecture_is_said_to_be_one() -> None:
    with pytest.raises(LookupError, match="riscv64"):
        numbers("riscv64")


def test_every_call_that_the_profile_allows_has_a_number() -> None:
    assert allowed() <= numbers("x86_64").keys()


# --- The host's side -----------------------------------------------------------------------------------


def test_what_arrives_at_a_listener_is_counted_and_nothing_else() -> None:
    with listening(["127.0.0.1", "203.0.113.1"]) as listeners:
        assert set(listeners.arrived().values()) == {0}
        (address,) = listeners.tcp
        host, port = address.split()
        socket.create_connection((host, int(port)), timeout=5).close()
        (udp,) = listeners.udp
        with socket.socket(type=socket.SOCK_DGRAM) as line:
            line.sendto(b"x", (host, int(udp.split()[1])))
        (name,) = listeners.abstract
        with socket.socket(socket.AF_UNIX) as line:
            line.connect("\0" + name)
        assert listeners.arrived() == {address: 1, f"@{name}": 1, f"udp {udp}": 1}


def test_a_process_is_read_and_one_that_is_gone_is_none() -> None:
    own = read_process("self")
    assert own is not None
    assert own.status["Name"]
    assert read_process("0") is None


def test_a_changed_file_has_another_hash(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("before")
    before = file_hashes(tmp_path)
    (tmp_path / "text").write_text(json.dumps("after"))
    assert file_hashes(tmp_path) != before
