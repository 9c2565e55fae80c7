"""What the engine is told about a sandbox: one pure function, a reason beside every setting.

The guest is hostile from its first instruction, so whatever is not needed is off.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from orchestrator.sandbox.port import GUEST_CONTEXT_DIR, GUEST_SOCKET_DIR, GUEST_TMP_DIR, SandboxSpec

LABEL_INSTANCE = "rlm.instance"
LABEL_SANDBOX = "rlm.sandbox"

_MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one sandbox may use."""

    memory_bytes: int
    cpus: float
    pids: int
    tmp_bytes: int
    shm_bytes: int
    open_files: int
    file_size_bytes: int


def create_arguments(
    spec: SandboxSpec, resources: Resources, *, image: str, instance_id: str
) -> dict[str, object]:
    """The body of the engine's `POST /containers/create`, except for the name."""
    return {
        "Image": image,  # pinned by id: a tag can change under a running pool
        "User": f"{spec.uid}:{spec.uid}",  # not root; a uid of its own, because kernel quotas are per uid
        "WorkingDir": GUEST_TMP_DIR,
        "Hostname": "sandbox",  # says nothing about host, tenant or run
        "Env": [f"HOME={GUEST_TMP_DIR}", "PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8"],
        "NetworkDisabled": True,
        "AttachStdin": False,
        "AttachStdout": False,
        "AttachStderr": False,
        "OpenStdin": False,
        "Tty": False,
        "StopSignal": "SIGKILL",  # there is nothing in there to say goodbye to
        "Labels": {LABEL_INSTANCE: instance_id, LABEL_SANDBOX: spec.sandbox_id},
        "HostConfig": _host_config(spec, resources),
    }


def _host_config(spec: SandboxSpec, resources: Resources) -> dict[str, object]:
    return {
        "Runtime": spec.runtime,
        "NetworkMode": "none",  # the only way out is the broker's socket
        "IpcMode": "private",  # not none: multiprocessing needs a small /dev/shm
        "ShmSize": resources.shm_bytes,
        "CgroupnsMode": "private",  # the host's is the default on cgroup v1
        "CapDrop": ["ALL"],
        "SecurityOpt": [
            "no-new-privileges:true",  # nothing in the image is setuid; this makes sure
            f"seccomp={_seccomp_profile()}",  # ours: the engine's own depends on its version
        ],
        "ReadonlyRootfs": True,
        "Tmpfs": {
            # noexec is hygiene, not a wall: Python runs whatever it reads.
            GUEST_TMP_DIR: f"rw,noexec,nosuid,nodev,size={resources.tmp_bytes},nr_inodes=16384,mode=1777",
        },
        "Mounts": [
            _read_only_bind(
                str(spec.socket_dir), GUEST_SOCKET_DIR
            ),  # it can talk, but not replace the socket
            _read_only_bind(str(spec.context_dir), GUEST_CONTEXT_DIR),
        ],
        "Memory": resources.memory_bytes,
        "MemorySwap": resources.memory_bytes,  # equal: no swap beyond memory
        "OomScoreAdj": 500,  # before anything of the host
        "NanoCpus": int(resources.cpus * 1e9),
        "PidsLimit": resources.pids,
        "Ulimits": [
            # No nproc: it counts per uid, not per container. PidsLimit does that job.
            _ulimit("nofile", resources.open_files),
            _ulimit("fsize", resources.file_size_bytes),
            _ulimit("core", 0),
            _ulimit("memlock", 64 * 1024),
            _ulimit("msgqueue", 0),
        ],
        "LogConfig": {"Type": "none"},  # a guest's output would fill the host's disk; ours comes over gRPC
        "RestartPolicy": {"Name": "no"},  # a sandbox is never used twice
        "AutoRemove": False,  # we remove it ourselves, and want to see how it ended
        # No init: the worker is PID 1. So no signal from a cell can end it, and it can end all else with one.
        "Init": False,
    }


@cache
def _seccomp_profile() -> str:
    """Generated from deploy/seccomp.toml, where the reasons are."""
    return files("orchestrator.sandbox").joinpath("seccomp.json").read_text(encoding="ascii")


def _read_only_bind(source: str, target: str) -> dict[str, object]:
    return {
        "Type": "bind",
        "Source": source,
        "Target": target,
        "ReadOnly": True,
        "BindOptions": {"Propagation": "rprivate"},
    }


def _ulimit(name: str, value: int) -> dict[str, object]:
    return {"Name": name, "Soft": value, "Hard": value}
