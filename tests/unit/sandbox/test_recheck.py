"""N09: the engine's word about a container that has just started, against what it was asked for."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import EngineError
from orchestrator.ids import SandboxId
from orchestrator.sandbox import recheck
from orchestrator.sandbox.port import SandboxSpec
from orchestrator.sandbox.posture import Resources, create_arguments

pytestmark = pytest.mark.case("N09")

RESOURCES = Resources(
    memory_bytes=1 << 29,
    cpus=1.0,
    pids=256,
    tmp_bytes=1 << 27,
    shm_bytes=1 << 24,
    open_files=1_024,
    file_size_bytes=1 << 28,
)
CREATED = {"Id": "f" * 64, "Warnings": []}


def asked(runtime: str = "runc") -> dict[str, Any]:
    spec = SandboxSpec(
        sandbox_id=SandboxId("s1"),
        socket_dir=Path("/state/sock"),
        context_dir=Path("/state/ctx"),
        uid=200_001,
        runtime=runtime,
    )
    return create_arguments(spec, RESOURCES, image="sha256:1", instance_id="i1")


def inspected(body: Mapping[str, Any], *, pid: int = 0) -> dict[str, Any]:
    """What a faithful engine says: all of it, what the image adds, and what it fills in."""
    config = {name: value for name, value in copy.deepcopy(dict(body)).items() if name != "HostConfig"}
    config["Env"] = [*config["Env"], "PYTHONDONTWRITEBYTECODE=1"]
    config["Labels"] = {**config["Labels"], "rlm.source": "0"}
    host_config = copy.deepcopy(body["HostConfig"])
    host_config.update(
        LogConfig={"Type": "none", "Config": {}},
        RestartPolicy={"Name": "no", "MaximumRetryCount": 0},
        Privileged=False,
        CapAdd=None,
        Devices=None,
        Binds=None,
        PidMode="",
        CgroupParent="",
        OomKillDisable=False,
    )
    host_config.setdefault("MaskedPaths", ["/proc/kcore"])
    host_config.setdefault("ReadonlyPaths", ["/proc/sys"])
    return {"Config": config, "HostConfig": host_config, "State": {"Running": pid > 0, "Pid": pid}}


def check(answer: object, *, created: object = CREATED) -> None:
    recheck.check(asked(), created, answer, runtime="runc")


def test_a_faithful_engine_passes() -> None:
    check(inspected(asked()))


def test_what_is_false_or_zero_may_be_left_out() -> None:
    answer = inspected(asked())
    for name in ("Init", "AutoRemove", "Privileged", "CapAdd"):
        answer["HostConfig"].pop(name, None)
    for name in ("AttachStdin", "Tty", "OpenStdin"):
        answer["Config"].pop(name, None)
    check(answer)


@pytest.mark.parametrize(
    ("name", "drifted"),
    [
        ("Memory", 0),
        ("MemorySwap", -1),
        ("PidsLimit", None),
        ("PidsLimit", 0),
        ("NanoCpus", 0),
        ("ReadonlyRootfs", False),
        ("NetworkMode", "bridge"),
        ("IpcMode", "host"),
        ("CgroupnsMode", "host"),
        ("CapDrop", None),
        ("SecurityOpt", None),
        ("SecurityOpt", ["no-new-privileges:true"]),
        ("SecurityOpt", ["no-new-privileges:true", "seccomp=unconfined"]),
        ("Ulimits", []),
        ("Tmpfs", {}),
        ("Mounts", []),
        ("LogConfig", {"Type": "json-file"}),
        ("Runtime", "crun"),
        ("Privileged", True),
        ("CapAdd", ["NET_ADMIN"]),
        ("Devices", [{"PathOnHost": "/dev/kvm"}]),
        ("DeviceRequests", [{"Count": -1}]),
        ("Binds", ["/:/host"]),
        ("GroupAdd", ["docker"]),
        ("PidMode", "host"),
        ("UsernsMode", "host"),
        ("UTSMode", "host"),
        ("CgroupParent", "/other"),
        ("OomKillDisable", True),
        ("MaskedPaths", []),
        ("ReadonlyPaths", None),
    ],
)
def test_a_setting_that_drifted_refuses_the_sandbox_by_name(name: str, drifted: object) -> None:
    answer = inspected(asked())
    answer["HostConfig"][name] = drifted
    with pytest.raises(EngineError, match=rf"another sandbox than it was asked for: {name}"):
        check(answer)


@pytest.mark.parametrize(
    ("name", "drifted"), [("User", "0:0"), ("User", ""), ("Image", "sha256:2"), ("NetworkDisabled", False)]
)
def test_a_drift_outside_of_the_limits_refuses_too(name: str, drifted: object) -> None:
    answer = inspected(asked())
    answer["Config"][name] = drifted
    with pytest.raises(EngineError, match=name):
        check(answer)


def test_a_mount_that_became_writable_is_seen() -> None:
    answer = inspected(asked())
    answer["HostConfig"]["Mounts"][0]["ReadOnly"] = False
    with pytest.raises(EngineError, match="Mounts"):
        check(answer)


@pytest.mark.case("A13")
@pytest.mark.parametrize(
    "warning",
    [
        "Your kernel does not support swap limit capabilities or the cgroup is not mounted. Memory limited"
        " without swap.",
        "Your kernel does not support memory limit capabilities. Limitation discarded.",
        "Your kernel does not support pids limit capabilities. PIDs limit discarded.",
        "Your kernel does not support CPU CFS quota.  Quota discarded.",
        "Seccomp is not enabled in your kernel, running container without default profile.",
    ],
)
def test_a_warning_about_a_part_of_the_wall_refuses_the_sandbox(warning: str) -> None:
    with pytest.raises(EngineError, match="it warns"):
        check(inspected(asked()), created={"Id": "1", "Warnings": [warning]})


@pytest.mark.parametrize(
    "told", [None, [], "", ["IPv4 forwarding is disabled. Networking will not work."], [None, 3]]
)
def test_a_warning_about_something_else_does_not(told: object) -> None:
    check(inspected(asked()), created={"Id": "1", "Warnings": told})


@pytest.mark.parametrize("answer", [None, [], {}, {"Config": {}}, {"Config": [], "HostConfig": {}}])
def test_an_engine_that_does_not_describe_its_container_is_refused(answer: object) -> None:
    with pytest.raises(EngineError, match="it does not describe its container"):
        check(answer)


def test_the_words_of_an_engine_are_shown_without_control_characters_and_cut() -> None:
    answer = inspected(asked())
    answer["HostConfig"]["NetworkMode"] = "\x1b[31m" + "x" * 100_000
    with pytest.raises(EngineError) as refused:
        check(answer, created={"Warnings": ["swap \x1b]0;owned\x07" + "y" * 100_000] * 50})
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 2_000


# --- gVisor --------------------------------------------------------------------------------------------


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    for pid, command in ((41, b"runsc-sandbox\0--root=/run\0boot"), (42, b"python3\0-m\0worker"), (43, b"")):
        directory = tmp_path / str(pid)
        directory.mkdir()
        (directory / "cmdline").write_bytes(command)
    return tmp_path


def check_gvisor(proc: Path, pid: object, *, running: bool = True) -> None:
    body = asked("runsc")
    answer = {**inspected(body), "State": {"Running": running, "Pid": pid}}
    recheck.check(body, CREATED, answer, runtime="runsc", proc=proc)


@pytest.mark.case("A14")
def test_a_sandbox_whose_process_is_gvisors_passes(proc: Path) -> None:
    check_gvisor(proc, 41)


@pytest.mark.case("A14")
@pytest.mark.parametrize("pid", [42, 43, 44, 0, None, "../41"])
def test_a_runtime_that_only_has_gvisors_name_is_refused(proc: Path, pid: object) -> None:
    with pytest.raises(EngineError, match="behind its runtime 'runsc' runs"):
        check_gvisor(proc, pid)


def test_one_that_ended_already_is_left_to_those_who_wait_for_it(proc: Path) -> None:
    check_gvisor(proc, 0, running=False)
