"""What the engine is told about a sandbox: one pure function, a reason beside every setting.

The guest is hostile from its first instruction, so whatever is not needed is off.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from orchestrator.sandbox.port import GUEST_CONTEXT_DIR, GUEST_SOCKET_DIR, GUEST_TMP_DIR, SandboxSpec

LABEL_INSTANCE = "rlm.instance"
LABEL_SANDBOX = "rlm.sandbox"
LABEL_EXPIRES = "rlm.expires"
"""Unix time, in seconds, at which whoever made the sandbox has certainly ended it, or is gone."""
LABEL_UID = "rlm.uid"

TMP_FILES = 16_384
"""Files in the guest's /tmp; each takes kernel memory besides its bytes."""

CPU_SHARES = 128
"""Weight of a sandbox against other containers, of which each has 1,024 unless told otherwise."""

_MIB = 1024 * 1024

# Both are lists of the engine's too, which grow with its version. These are the same on every engine.
_MASKED_PATHS = [
    # Secrets of the kernel, of the hardware, of others' work. Most are for root alone; we count on no uid.
    "/proc/acpi", "/proc/asound", "/proc/config.gz", "/proc/interrupts", "/proc/kallsyms", "/proc/kcore",
    "/proc/keys", "/proc/latency_stats", "/proc/modules", "/proc/sched_debug", "/proc/scsi",
    "/proc/timer_list", "/proc/timer_stats", "/sys/firmware", "/sys/kernel/debug", "/sys/kernel/tracing",
    "/sys/kernel/security",
    # From the power that a processor draws its keys have been read (CVE-2020-8694).
    "/sys/devices/virtual/powercap", "/sys/class/powercap",
    # How the host was started, what its disks are called: nothing a cell needs.
    "/proc/cmdline", "/proc/diskstats", "/proc/partitions", "/proc/swaps", "/sys/devices/virtual/dmi",
]  # fmt: skip
_READ_ONLY_PATHS = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


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
        "Labels": {
            # Who made it and until when it may live: for the reaper (`sandbox/reaper.py`).
            LABEL_INSTANCE: instance_id,
            LABEL_SANDBOX: spec.sandbox_id,
            LABEL_EXPIRES: str(spec.expires_at_s),
            LABEL_UID: str(spec.uid),
        },
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
        "MaskedPaths": _MASKED_PATHS,
        "ReadonlyPaths": _READ_ONLY_PATHS,
        "ReadonlyRootfs": True,
        "Tmpfs": {
            # noexec is hygiene, not a wall: Python runs whatever it reads.
            GUEST_TMP_DIR: (
                f"rw,noexec,nosuid,nodev,size={resources.tmp_bytes},nr_inodes={TMP_FILES},mode=1777"
            ),
        },
        # No option of the engine makes these two nosuid, nodev and noexec; a state directory on a file system
        # that is hands it on. They hold no setuid file, device or program, and no guest makes one.
        "Mounts": [
            # It can talk, but not replace the socket.
            _read_only_bind(str(spec.socket_dir), GUEST_SOCKET_DIR),
            _read_only_bind(str(spec.context_dir), GUEST_CONTEXT_DIR),
        ],
        "Memory": resources.memory_bytes,
        # Equal: no swap beyond memory. No MemorySwappiness beside it: cgroup version 2 has no such thing, and
        # needs none, since this means no swap at all there; its engines warn of it.
        "MemorySwap": resources.memory_bytes,
        "OomScoreAdj": 500,  # before anything of the host
        "NanoCpus": int(resources.cpus * 1e9),
        "CpuShares": CPU_SHARES,  # on a busy machine its owner's other containers come first
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
