"""Group C and A10: the kernel, and what sandboxes could share through it."""

from collections.abc import Iterator, Mapping

from orchestrator.probes.calls import CLOSED, LEFT_OUT, PASSES, allowed, numbers
from orchestrator.probes.finding import Differs, Facts, Probe
from orchestrator.probes.host import Host

_REFUSED = frozenset({"EPERM", "ENOSYS"})
_UNSUPPORTED = _REFUSED | {"EACCES", "EAFNOSUPPORT", "ESOCKTNOSUPPORT", "ENODEV", "ENOTSUP"}
"""Under gVisor a call does not reach the host's kernel; these are its own ways to have no such thing."""

SERVED_BY_GVISOR: Mapping[str, str] = {
    **dict.fromkeys(
        ("socket AF_INET", "socket AF_INET datagrams", "socket AF_INET6", "socket AF_NETLINK"),
        "sockets of its own network stack, which has a loopback interface and nothing else",
    ),
    **dict.fromkeys(
        ("clone NEWUSER", "clone NEWUSER NEWNET", "unshare NEWUSER", "setns"),
        "namespaces of its own kernel; the host's number of namespaces does not change",
    ),
    **dict.fromkeys(
        ("ptrace TRACEME", "process_vm_readv", "process_vm_writev"),
        "tracing, among the sandbox's own processes",
    ),
    **dict.fromkeys(
        ("mknodat of a character device", "mknodat of a block device", "mknodat of a pipe"),
        "nodes in its own file system; there is no device behind them",
    ),
    **dict.fromkeys(
        ("personality", "personality with upper bits", "seccomp"), "a setting of its own process"
    ),
    **dict.fromkeys(
        ("splice", "tee", "inotify_init1", "io_setup", "timer_create", "io_uring_setup", "clone3"),
        "its own implementation, in memory that counts as the sandbox's",
    ),
    **dict.fromkeys(
        ("msgget", "shmget", "semget", "mq_open"), "shared memory and queues that end with the sandbox"
    ),
    "syslog": "its own log, which holds nothing of the host",
}
"""Calls that our profile refuses under runc, and that gVisor answers itself, from its own kernel."""

_PAST_EVERY_FILTER = {"uretprobe", "uprobe"}
"""Linux asks no filter about these; they work only in code where a probe of the kernel's is."""
_PASS_UNDER_GVISOR = ("getpid", "socket AF_UNIX", "clone")
_MAX_OWN_PROCESSES = 5
_MIN_CALLS = 60


def passed(facts: Facts, machine: str) -> set[str]:
    """The calls of a sweep that reached a kernel; those without a name by their number."""
    names = {number: name for name, number in numbers(machine).items()}
    return {
        names.get(number, str(number))
        for answer, those in facts["answers"].items()
        if answer not in _REFUSED
        for number in those
    }


def _named(facts: Facts, host: Host, *labels: str) -> Iterator[str | Differs]:
    """Of these calls, or of all, those that went through."""
    closed = _UNSUPPORTED if host.runtime == "runsc" else _REFUSED
    served: list[str] = []
    for label in labels or CLOSED:
        answer = facts["calls"].get(label)
        if answer in closed or (answer is None and CLOSED[label][0] not in numbers(host.machine)):
            continue
        if host.runtime == "runsc" and label in SERVED_BY_GVISOR:
            served.append(label)
        else:
            yield f"{label}: {answer}"
    if served:
        yield Differs(f"gVisor's own kernel answers {', '.join(served)}")


def _calls(facts: Facts, host: Host) -> Iterator[str | Differs]:
    yield from _named(facts, host)
    must = PASSES if host.runtime == "runc" else _PASS_UNDER_GVISOR
    for label in must:
        if facts["calls"][label] != "open":
            raise ValueError(f"the probe itself is broken: {label} says {facts['calls'][label]}")
    if len(facts["calls"]) < _MIN_CALLS:
        raise ValueError(f"only {len(facts['calls'])} calls were made")
    for label in ("i386 getpid", "x32 getpid"):
        if facts["calls"].get(label, "SIGSYS") not in {"SIGSYS", "SIGSEGV", "ENOSYS"}:
            yield f"{label}: {facts['calls'][label]}"


def _sweep(facts: Facts, host: Host) -> Iterator[str]:
    if not facts["finished"]:
        raise ValueError("the sweep did not come to its end")
    through = passed(facts, host.machine)
    if len(through) < len(allowed() & numbers(host.machine).keys()) / 2:
        raise ValueError(f"only {len(through)} calls went through: the sweep is blind")
    if host.runtime == "runc" and (extra := through - allowed() - _PAST_EVERY_FILTER - LEFT_OUT.keys()):
        yield f"calls that the profile does not name went through: {sorted(extra)}"


def _user_namespaces(facts: Facts, host: Host) -> Iterator[str | Differs]:
    yield from _named(
        facts, host, "clone NEWUSER", "clone NEWUSER NEWNET", "clone3", "unshare NEWUSER", "setns"
    )


def _cgroups(facts: Facts, _host: Host) -> Iterator[str]:
    if facts["cgroup"]:
        yield f"cgroup files can be written: {facts['cgroup'][:5]}"


def _processes(facts: Facts, _host: Host) -> Iterator[str]:
    strangers = {pid: name for pid, name in facts["comms"].items() if name != "python3"}
    if strangers or len(facts["pids"]) > _MAX_OWN_PROCESSES or facts["pids"][0] != 1:
        yield f"processes {facts['pids'][:10]} {strangers}"


def _descriptors(facts: Facts, host: Host) -> Iterator[str]:
    ours = ("/dev/null", "pipe:", "socket:", "anon_inode:[event", "host:[")
    for name, target in facts["worker"].items():
        if not target.startswith(ours):
            yield f"the worker holds {target} at {name}"
    for name, target in facts["child"].items():
        if int(name) > 2 and target:  # past stderr; the listing itself has no target any more
            yield f"a new process holds {target} at {name}"
    seen = {facts["cwd"]["worker"], facts["cwd"]["here"]} - {""}
    if seen != {"/tmp"}:  # noqa: S108
        yield f"working directories {sorted(seen)}"
    programs = {facts["exe"]["worker"], facts["exe"]["here"]} - {""}
    if any("/proc" in path or "runc" in path or not path.startswith("/usr/") for path in programs):
        yield f"programs {sorted(programs)}"
    if host.runtime == "runc" and not facts["exe"]["worker"]:
        raise ValueError("the worker's program cannot be seen")


def _programs(facts: Facts, _host: Host) -> Iterator[str]:
    for what in ("write to PID 1's program", "write to its own program"):
        if facts["others"][what] not in {"EACCES", "EROFS", "ETXTBSY", "EPERM"}:
            yield f"{what}: {facts['others'][what]}"


def _ipc(facts: Facts, host: Host) -> Iterator[str | Differs]:
    yield from _named(facts, host, "msgget", "shmget", "semget", "mq_open")


def _keys(facts: Facts, host: Host) -> Iterator[str | Differs]:
    yield from _named(facts, host, "add_key", "request_key", "keyctl")


def _quotas(facts: Facts, host: Host) -> Iterator[str | Differs]:
    if facts["inotify"] and host.runtime == "runsc":
        yield Differs(f"{facts['inotify']} inotify instances of gVisor's own; none of the host's")
    elif facts["inotify"]:
        yield f"{facts['inotify']} inotify instances of a kernel quota"
    if facts["msgqueue"] != [0, 0]:
        yield f"room for message queues: {facts['msgqueue']}"


def _crash(facts: Facts, host: Host) -> Iterator[str]:
    if facts["crash"] != "SIGABRT":
        yield f"a crash left {facts['crash']}"
    if facts["core_limit"] != [0, 0]:
        yield f"cores may have {facts['core_limit']} bytes"
    if host.runtime == "runc" and host.core_pattern.startswith("|"):
        # Such a handler runs on the host, is fed the guest's memory, and no limit of a core's size stops it.
        yield f"the host's kernel.core_pattern hands crashes to {host.core_pattern[1:80]!r}"


def _page_cache(facts: Facts, host: Host) -> Iterator[str | Differs]:
    yield from _named(facts, host, "socket AF_ALG", "splice", "vmsplice", "tee")


def _clocks(facts: Facts, host: Host) -> Iterator[str | Differs]:
    yield from _named(
        facts,
        host,
        "settimeofday",
        "clock_settime",
        "adjtimex",
        "clock_adjtime",
        "sethostname",
        "setdomainname",
    )


def _logs(facts: Facts, _host: Host) -> Iterator[str]:
    for path in ("/proc/kmsg", "/proc/kallsyms", "/proc/timer_list", "/proc/slabinfo", "/dev/kmsg"):
        if facts["secrets"][path] not in {"ENOENT", "EACCES", "EPERM", "0 bytes", "0 addresses"}:
            yield f"{path}: {facts['secrets'][path]}"


PROBES = (
    Probe("A10", "system calls that no cell needs are refused", "calls", _calls),
    Probe("A10", "no system call passes that the profile does not name", "sweep", _sweep),
    Probe("C01", "no user namespace", "calls", _user_namespaces),
    Probe("C02", "no cgroup file can be written", "kernel_files", _cgroups),
    Probe("C03", "only its own processes are in sight", "kernel_files", _processes),
    Probe("C04", "nothing of the host was left open", "descriptors", _descriptors),
    Probe("C05", "no running program can be overwritten", "kernel_files", _programs),
    Probe("C07", "no shared memory or queue of the kernel's", "calls", _ipc),
    Probe("C08", "no keyring", "calls", _keys),
    Probe("C09", "no kernel quota that is counted per user", "quotas", _quotas),
    Probe("C10", "a crash leaves nothing", "quotas", _crash),
    Probe("C11", "the kernel's log and addresses are hidden", "kernel_files", _logs),
    Probe("C12", "what attacks on the page cache need is closed", "calls", _page_cache),
    Probe("C13", "clock and names cannot be set", "calls", _clocks),
)
