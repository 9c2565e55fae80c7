import hashlib
from pathlib import Path
from typing import Any

from orchestrator.ids import SandboxId
from orchestrator.sandbox.port import SandboxSpec
from orchestrator.sandbox.posture import Resources, create_arguments

SPEC = SandboxSpec(
    sandbox_id=SandboxId("s1"),
    socket_dir=Path("/state/sock"),
    context_dir=Path("/state/ctx"),
    uid=200_001,
    runtime="runsc",
    expires_at_s=1_700_000_600,
)
RESOURCES = Resources(
    memory_bytes=512 << 20,
    cpus=1.5,
    pids=256,
    tmp_bytes=128 << 20,
    shm_bytes=16 << 20,
    open_files=1_024,
    file_size_bytes=256 << 20,
)

SECCOMP_SHA256 = "b7ed4cf8737ffd3f2b58e7c10d64af22c33a74f4e52a7867c22aa3bedfa32a4b"
"""Of orchestrator/sandbox/seccomp.json: a change of what a guest may ask of the kernel is made here too."""


def test_a_sandbox_is_created_with_exactly_this_and_nothing_else() -> None:
    """Written down whole: whatever changes here changes what a hostile guest can do."""
    arguments: dict[str, Any] = create_arguments(SPEC, RESOURCES, image="sha256:abc", instance_id="i1")
    no_new_privileges, seccomp = arguments["HostConfig"].pop("SecurityOpt")
    assert no_new_privileges == "no-new-privileges:true"
    assert hashlib.sha256(seccomp.removeprefix("seccomp=").encode()).hexdigest() == SECCOMP_SHA256
    assert arguments == {
        "Image": "sha256:abc",
        "User": "200001:200001",
        "WorkingDir": "/tmp",
        "Hostname": "sandbox",
        "Env": ["HOME=/tmp", "PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8"],
        "NetworkDisabled": True,
        "AttachStdin": False,
        "AttachStdout": False,
        "AttachStderr": False,
        "OpenStdin": False,
        "Tty": False,
        "StopSignal": "SIGKILL",
        "Labels": {
            "rlm.instance": "i1",
            "rlm.sandbox": "s1",
            "rlm.expires": "1700000600",
            "rlm.uid": "200001",
        },
        "HostConfig": {
            "Runtime": "runsc",
            "NetworkMode": "none",
            "IpcMode": "private",
            "ShmSize": 16_777_216,
            "CgroupnsMode": "private",
            "CapDrop": ["ALL"],
            "ReadonlyRootfs": True,
            "Tmpfs": {"/tmp": "rw,noexec,nosuid,nodev,size=134217728,nr_inodes=16384,mode=1777"},
            "Mounts": [
                {
                    "Type": "bind",
                    "Source": "/state/sock",
                    "Target": "/run/rlm",
                    "ReadOnly": True,
                    "BindOptions": {"Propagation": "rprivate"},
                },
                {
                    "Type": "bind",
                    "Source": "/state/ctx",
                    "Target": "/context",
                    "ReadOnly": True,
                    "BindOptions": {"Propagation": "rprivate"},
                },
            ],
            "Memory": 536_870_912,
            "MemorySwap": 536_870_912,
            "OomScoreAdj": 500,
            "NanoCpus": 1_500_000_000,
            "PidsLimit": 256,
            "Ulimits": [
                {"Name": "nofile", "Soft": 1_024, "Hard": 1_024},
                {"Name": "fsize", "Soft": 268_435_456, "Hard": 268_435_456},
                {"Name": "core", "Soft": 0, "Hard": 0},
                {"Name": "memlock", "Soft": 65_536, "Hard": 65_536},
                {"Name": "msgqueue", "Soft": 0, "Hard": 0},
            ],
            "LogConfig": {"Type": "none"},
            "RestartPolicy": {"Name": "no"},
            "AutoRemove": False,
            "Init": False,
        },
    }


def test_nothing_in_it_names_a_tenant_or_a_run() -> None:
    text = str(create_arguments(SPEC, RESOURCES, image="sha256:abc", instance_id="i1")).lower()
    assert "tenant" not in text
    assert "run_id" not in text
