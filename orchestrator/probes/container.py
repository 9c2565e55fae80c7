"""Group A: how the container is made."""

from collections.abc import Iterator
from typing import Any

from orchestrator.probes.finding import Differs, Facts, Probe
from orchestrator.probes.host import Host
from orchestrator.sandbox.posture import CPU_SHARES

_ENVIRONMENT = {"HOME", "PATH", "LANG", "HOSTNAME", "PYTHONDONTWRITEBYTECODE"}
_OF_THE_INTERPRETER = {"PYTHONHASHSEED", "PYTHONUTF8"}
"""Set by the worker. The hash seed is no secret: it is the run's, and recorded."""

_ROOT_TYPES = {
    "overlay",
    "9p",
    "fuse.fuse-overlayfs",
    "btrfs",
    "zfs",
    "ext4",
    "xfs",
    "aufs",
    "gofer",
    "lisafs",
}
_HARMLESS = frozenset({"nosuid", "nodev", "noexec"})
_MOUNTS: dict[str, tuple[set[str] | None, frozenset[str]]] = {
    "/": (_ROOT_TYPES, frozenset({"ro"})),
    "/proc": ({"proc"}, _HARMLESS),
    "/dev": ({"tmpfs", "devtmpfs"}, frozenset({"nosuid"})),
    "/dev/pts": ({"devpts"}, frozenset({"noexec"})),
    "/dev/mqueue": ({"mqueue"}, _HARMLESS),
    "/dev/shm": ({"tmpfs"}, _HARMLESS),  # noqa: S108 - a mount point
    "/sys": ({"sysfs"}, frozenset({"ro"})),
    "/sys/fs/cgroup": ({"tmpfs", "cgroup2"}, _HARMLESS),
    "/tmp": ({"tmpfs"}, _HARMLESS),  # noqa: S108 - a mount point
    "/context": (None, frozenset({"ro"})),
    "/run/rlm": (None, frozenset({"ro"})),
    "/etc/hostname": (None, frozenset({"ro"})),
}
"""What may be mounted: where, of which types (None: the host's own), with which options at least."""
_GVISOR_SHOWS = frozenset({"ro", "noexec"})
"""Old releases of gVisor list no other options of their own mounts."""
SCRATCH = {"/dev/shm", "/tmp"}  # noqa: S108 - the sandbox's own
"""Where a cell may write. Both are in memory."""

_DEVICES = {
    "null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "fd", "stdin", "stdout", "stderr",
    "shm", "mqueue", "console",
}  # fmt: skip
_DEVICES_OF_GVISOR = {"net", "fuse"}
"""Its own: there is no device of the host behind them."""
_NO_SECRET = {"ENOENT", "EACCES", "EPERM", "0 bytes", "0 entries", "0 addresses"}

_MIN_DIRECTORIES = 100
_MIN_KERNEL_FILES = 20
_PRIVATE = {
    # No user namespace: that is the engine's own setting (userns-remap), for all containers or none.
    "runc": ("cgroup", "ipc", "mnt", "net", "pid", "uts"),
    # The guest's processes are gVisor's, with numbers of its own. Its own process is one of the host's.
    "runsc": ("ipc", "mnt", "net", "user", "uts"),
}


def _capabilities(facts: Facts, host: Host) -> Iterator[str]:
    held = {name: value for name, value in facts["capabilities"].items() if value}
    if held:
        yield f"a cell holds {held}"
    if len(facts["capabilities"]) < 4:  # gVisor shows no ambient set
        yield "not all sets of capabilities are shown"
    if host.config["CapDrop"] != ["ALL"] or host.config["CapAdd"]:
        yield f"the engine drops {host.config['CapDrop']} and adds {host.config['CapAdd']}"


def _no_new_privileges(facts: Facts, host: Host) -> Iterator[str]:
    if facts["no_new_privileges"] != 1:
        yield f"PR_GET_NO_NEW_PRIVS says {facts['no_new_privileges']}"
    if host.runtime == "runc" and host.process.status["NoNewPrivs"] != "1":
        yield "the host's kernel says that new privileges can be gained"


def _seccomp(facts: Facts, host: Host) -> Iterator[str | Differs]:
    if host.process.status["Seccomp"] != "2":
        yield f"no filter on the sandbox's process: mode {host.process.status['Seccomp']}"
    if host.runtime == "runsc":
        yield Differs("the filter is gVisor's own, on its process; our profile is not applied to the guest")
    elif facts["seccomp"] != "2":
        yield f"no filter on a cell: mode {facts['seccomp']}"


def _uid(facts: Facts, host: Host) -> Iterator[str]:
    told = int(host.inspected["Config"]["User"].partition(":")[0])
    if facts["uids"] != [told] or facts["gids"] != [told]:
        yield f"uid {facts['uids']} and groups {facts['gids']} instead of {told}"
    if told == 0:
        yield "root"
    if host.uid == 0 and told < _FIRST_GUEST_UID:
        yield f"uid {told} is not from the range of guests"


_FIRST_GUEST_UID = 200_000


def _namespaces(facts: Facts, host: Host) -> Iterator[str | Differs]:
    # gVisor's own numbers say nothing about the host; those of its process do.
    inside = facts["namespaces"] if host.runtime == "runc" else host.process.namespaces
    for name in _PRIVATE[host.runtime]:
        if not inside[name] or inside[name] == host.namespaces[name]:
            yield f"the host's {name} namespace"
    if host.runtime == "runsc" and host.process.namespaces["pid"] == host.namespaces["pid"]:
        yield Differs("gVisor's process is one of the host's; the guest's processes are gVisor's")


def _mounts(facts: Facts, host: Host) -> Iterator[str]:
    points = {point for point, *_ in facts["mounts"]}
    for needed in ("/", "/tmp", "/context", "/run/rlm"):  # noqa: S108
        if needed not in points:
            yield f"{needed} is no mount of its own"
    for point, kind, options, root in facts["mounts"]:
        has = set(options.split(","))
        known = _MOUNTS.get(point)
        if known is None:
            if not _is_mask(point, kind, has, root):
                yield f"unexpected mount {point} ({kind} {options})"
            continue
        kinds, needs = known
        if host.runtime == "runsc":
            needs &= _GVISOR_SHOWS
        if (kinds is not None and kind not in kinds) or not needs <= has:
            yield f"{point} is {kind} {options}"
    if facts["looked_at"] < _MIN_DIRECTORIES:
        yield f"only {facts['looked_at']} directories were tried"
    if set(facts["created_in"]) != SCRATCH:
        yield f"files can be made in {sorted(facts['created_in'])}"
    masked = {point for point, _, _, root in facts["mounts"] if root == "/null"}
    if extra := set(facts["writable_points"]) - SCRATCH - masked:
        yield f"can be written: {sorted(extra)}"


def _is_mask(point: str, kind: str, options: set[str], root: str) -> bool:
    """Whether a mount only takes away: /dev/null over a kernel file, an empty or read-only tree."""
    if not point.startswith(("/proc/", "/sys/")):
        return False
    return root == "/null" or ("ro" in options and kind in {"tmpfs", "proc", "sysfs", "cgroup"})


def _devices(facts: Facts, host: Host) -> Iterator[str | Differs]:
    known = _DEVICES | (_DEVICES_OF_GVISOR if host.runtime == "runsc" else set())
    if extra := facts["devices"].keys() - known:
        yield f"devices {sorted(extra)}"
    if "block" in facts["devices"].values():
        yield "a block device in /dev"
    made = {name: answer["made"] for name, answer in facts["mknod"].items()}
    if facts["mknod"]["block device"]["opened"] not in {"EPERM", "EACCES", "ENXIO", "ENODEV"}:
        yield f"a disk was opened: {facts['mknod']['block device']}"
    if not set(made.values()) <= {"EPERM", "EACCES"}:
        if host.runtime == "runsc":
            yield Differs("nodes can be made in gVisor's own file system; there is no device behind them")
        else:
            yield f"mknod: {made}"


def _environment(facts: Facts, host: Host) -> Iterator[str]:
    if extra := facts["worker_environment"].keys() - _ENVIRONMENT:
        yield f"the worker has {sorted(extra)}"
    if extra := facts["environment"].keys() - _ENVIRONMENT - _OF_THE_INTERPRETER:
        yield f"a cell has {sorted(extra)}"
    if facts["environment"]["PATH"] != "/usr/local/bin:/usr/bin:/bin":
        yield f"PATH is {facts['environment']['PATH']}"
    names = {entry.partition("=")[0] for entry in host.inspected["Config"]["Env"]}
    if extra := names - _ENVIRONMENT:
        yield f"the engine was given {sorted(extra)}"


def _kernel_files(facts: Facts, _host: Host) -> Iterator[str]:
    if facts["writable"]:
        yield f"can be written: {facts['writable'][:5]}"
    if not facts["finished"] or facts["tried"] < _MIN_KERNEL_FILES:
        yield f"the walk did not come to its end after {facts['tried']} files"
    if triggers := [path for path, can in facts["triggers"].items() if can]:
        yield f"can be written: {triggers}"
    if secrets := {path: seen for path, seen in facts["secrets"].items() if seen not in _NO_SECRET}:
        yield f"can be read: {secrets}"


def _limits_inside(facts: Facts, host: Host) -> Iterator[str]:
    wanted = {
        "nofile": host.resources.open_files,
        "fsize": host.resources.file_size_bytes,
        "core": 0,
        "memlock": 64 * 1024,
        "msgqueue": 0,
    }
    for name, value in wanted.items():
        if facts["limits"][name] != [value, value]:
            yield f"{name} is {facts['limits'][name]}, not {value}"


def _host_config(_facts: Facts, host: Host) -> Iterator[str]:
    config: Any = host.config
    told = {
        "Memory": config["Memory"] == config["MemorySwap"] == host.resources.memory_bytes,
        "PidsLimit": config["PidsLimit"] == host.resources.pids,
        "NanoCpus": config["NanoCpus"] == int(host.resources.cpus * 1e9),
        "LogConfig": config["LogConfig"]["Type"] == "none",
        "IpcMode": config["IpcMode"] in {"none", "private"},
        "PidMode": config["PidMode"] == "",
        "UTSMode": config["UTSMode"] == "",
        "UsernsMode": config["UsernsMode"] != "host",
        "CgroupnsMode": config["CgroupnsMode"] == "private",
        "NetworkMode": config["NetworkMode"] == "none",
        "ReadonlyRootfs": config["ReadonlyRootfs"] is True,
        "Privileged": config["Privileged"] is False,
        "Devices": not config["Devices"],
        "Binds": not config["Binds"],
        "GroupAdd": not config["GroupAdd"],
        "RestartPolicy": config["RestartPolicy"]["Name"] in {"", "no"},
        "Runtime": config["Runtime"] == host.runtime,
        "SecurityOpt": not any("unconfined" in option for option in config["SecurityOpt"]),
        "OomScoreAdj": config["OomScoreAdj"] > 0,
    }
    if wrong := sorted(name for name, right in told.items() if not right):
        yield f"the engine was told otherwise of {wrong}"


def _limits_in_force(facts: Facts, host: Host) -> Iterator[str]:
    yield from _limits_inside(facts, host)
    cgroup, resources = host.process.cgroup, host.resources
    if "memory.max" in cgroup:
        quota, period = (int(figure) for figure in cgroup["cpu.max"].split())
        wanted = {"memory.max": resources.memory_bytes, "memory.swap.max": 0, "pids.max": resources.pids}
    else:
        quota, period = int(cgroup["cpu.cfs_quota_us"]), int(cgroup["cpu.cfs_period_us"])
        wanted = {
            "memory.limit_in_bytes": resources.memory_bytes,
            "memory.memsw.limit_in_bytes": resources.memory_bytes,
            "pids.max": resources.pids,
        }
    # Version 2 has weights instead, of which 100 is everybody's.
    if not (cgroup.get("cpu.shares") == str(CPU_SHARES) or int(cgroup.get("cpu.weight", "100")) < 100):
        yield "it has as much weight as any other container"
    for name, value in wanted.items():
        if cgroup.get(name) != str(value):
            yield f"{name} is {cgroup.get(name, 'missing')} on the host, not {value}"
    if quota != round(resources.cpus * period):
        yield f"the host gives {quota} of {period} µs, not {resources.cpus:g} CPUs"


def _asked_runtime(facts: Facts, host: Host) -> Iterator[str]:
    is_gvisor = host.release not in facts["version"] and "4.4.0" in facts["version"]
    if host.runtime == "runsc":
        if not is_gvisor:
            yield f"no gVisor inside: {facts['version'][:80]}"
        if "runsc" not in host.process.command:
            yield f"no gVisor on the host: {host.process.command[:80]}"
    elif host.release not in facts["version"]:
        yield f"another kernel than the host's: {facts['version'][:80]}"


PROBES = (
    Probe("A01", "no capability in any set", "identity", _capabilities),
    Probe("A02", "no new privileges", "identity", _no_new_privileges),
    Probe("A03", "a system call filter is in force", "identity", _seccomp),
    Probe("A04", "not root, in no group but its own", "identity", _uid),
    Probe("A05", "namespaces are not the host's", "identity", _namespaces),
    Probe("A06", "only known mounts, writable only in memory", "mounts", _mounts),
    Probe("A07", "only harmless devices", "mounts", _devices),
    Probe("A08", "the environment is the allow-list", "identity", _environment),
    Probe("A09", "kernel files cannot be written, secrets not read", "kernel_files", _kernel_files),
    Probe("A11", "the engine was told every limit", "identity", _host_config),
    Probe("A12", "limits are in force on the host", "identity", _limits_in_force),
    Probe("A14", "it is the runtime that was asked for", "identity", _asked_runtime),
)
