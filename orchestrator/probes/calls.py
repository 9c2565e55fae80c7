"""Which system calls the probes make: a named list with telling arguments, and a sweep over all numbers.

A named call is closed if the answer is EPERM or ENOSYS. Any other, EFAULT and EINVAL included, comes from the
kernel's own code: the call went through. All arguments do nothing where the call is let through.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

BAD = 1
"""An address nothing is at: who follows it says EFAULT."""
NONE = -1
"""No descriptor, no process, no flags that any call knows."""

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_ALG, AF_VSOCK = 1, 2, 10, 16, 17, 38, 40
STREAM, DGRAM, RAW, SEQPACKET = 1, 2, 3, 5
NEW_USER, NEW_NET, SIGCHLD = 0x10000000, 0x40000000, 17
AT_FDCWD = -100

Call = tuple[str, tuple[int, ...]]

CLOSED: Mapping[str, Call] = {
    "socket AF_INET": ("socket", (AF_INET, STREAM, 0)),
    "socket AF_INET datagrams": ("socket", (AF_INET, DGRAM, 0)),
    "socket AF_INET6": ("socket", (AF_INET6, STREAM, 0)),
    "socket AF_NETLINK": ("socket", (AF_NETLINK, RAW, 0)),
    "socket AF_PACKET": ("socket", (AF_PACKET, RAW, 0)),
    "socket AF_ALG": ("socket", (AF_ALG, SEQPACKET, 0)),
    "socket AF_VSOCK": ("socket", (AF_VSOCK, STREAM, 0)),
    "socketpair AF_INET": ("socketpair", (AF_INET, STREAM, 0, BAD)),
    "io_uring_setup": ("io_uring_setup", (1, BAD)),
    "io_uring_enter": ("io_uring_enter", (NONE, 0, 0, 0, 0, 0)),
    "io_uring_register": ("io_uring_register", (NONE, 0, 0, 0)),
    "clone NEWUSER": ("clone", (NEW_USER | SIGCHLD, 0, 0, 0, 0)),
    "clone NEWUSER NEWNET": ("clone", (NEW_USER | NEW_NET | SIGCHLD, 0, 0, 0, 0)),
    "clone3": ("clone3", (BAD, 88)),
    "unshare NEWUSER": ("unshare", (NEW_USER,)),
    "setns": ("setns", (NONE, 0)),
    "ptrace TRACEME": ("ptrace", (0, 0, 0, 0)),
    "process_vm_readv": ("process_vm_readv", (NONE, 0, 0, 0, 0, 0)),
    "process_vm_writev": ("process_vm_writev", (NONE, 0, 0, 0, 0, 0)),
    "process_madvise": ("process_madvise", (NONE, 0, 0, 0, 0)),
    "kcmp": ("kcmp", (1, 1, NONE, 0, 0)),
    "pidfd_getfd": ("pidfd_getfd", (NONE, 0, 0)),
    "add_key": ("add_key", (BAD, BAD, 0, 0, 0)),
    "request_key": ("request_key", (BAD, BAD, 0, 0)),
    "keyctl": ("keyctl", (0, NONE, 0, 0, 0)),
    "bpf": ("bpf", (0, BAD, 1 << 30)),
    "perf_event_open": ("perf_event_open", (BAD, 0, NONE, NONE, 0)),
    "userfaultfd": ("userfaultfd", (1,)),
    "memfd_secret": ("memfd_secret", (NONE,)),
    "mount": ("mount", (BAD, BAD, BAD, 0, 0)),
    "umount2": ("umount2", (BAD, NONE)),
    "pivot_root": ("pivot_root", (BAD, BAD)),
    "chroot": ("chroot", (BAD,)),
    "open_tree": ("open_tree", (NONE, BAD, 0)),
    "move_mount": ("move_mount", (NONE, BAD, NONE, BAD, 0)),
    "fsopen": ("fsopen", (BAD, 0)),
    "fsconfig": ("fsconfig", (NONE, 0, 0, 0, 0)),
    "fsmount": ("fsmount", (NONE, 0, 0)),
    "fspick": ("fspick", (NONE, BAD, 0)),
    "mount_setattr": ("mount_setattr", (NONE, BAD, 0, BAD, 1)),
    "name_to_handle_at": ("name_to_handle_at", (AT_FDCWD, BAD, BAD, BAD, 0)),
    "open_by_handle_at": ("open_by_handle_at", (NONE, BAD, 0)),
    "mknodat of a character device": ("mknodat", (AT_FDCWD, BAD, 0o020600, 0x0103)),
    "mknodat of a block device": ("mknodat", (AT_FDCWD, BAD, 0o060600, 0x0800)),
    "mknodat of a pipe": ("mknodat", (AT_FDCWD, BAD, 0o010600, 0)),
    "quotactl": ("quotactl", (NONE, BAD, 0, 0)),
    "swapon": ("swapon", (BAD, 0)),
    "swapoff": ("swapoff", (BAD,)),
    "reboot": ("reboot", (0, 0, 0, 0)),
    "kexec_load": ("kexec_load", (0, NONE, BAD, 0)),
    "kexec_file_load": ("kexec_file_load", (NONE, NONE, 0, 0, 0)),
    "init_module": ("init_module", (BAD, 0, BAD)),
    "finit_module": ("finit_module", (NONE, BAD, 0)),
    "delete_module": ("delete_module", (BAD, 0)),
    "syslog": ("syslog", (10, 0, 0)),
    "settimeofday": ("settimeofday", (BAD, 0)),
    "clock_settime": ("clock_settime", (0, BAD)),
    "adjtimex": ("adjtimex", (BAD,)),
    "clock_adjtime": ("clock_adjtime", (0, BAD)),
    "acct": ("acct", (BAD,)),
    "sethostname": ("sethostname", (BAD, 1)),
    "setdomainname": ("setdomainname", (BAD, 1)),
    "personality": ("personality", (0x0040000,)),
    "personality with upper bits": ("personality", (0x0040000 | 1 << 32,)),
    "sched_setattr": ("sched_setattr", (0, 0, 0)),
    "nfsservctl": ("nfsservctl", (0, 0, 0)),
    "vhangup": ("vhangup", ()),
    "iopl": ("iopl", (4,)),
    "ioperm": ("ioperm", (0, 0, 0)),
    "modify_ldt": ("modify_ldt", (0, 0, 0)),
    "seccomp": ("seccomp", (2, 0, 0)),
    "splice": ("splice", (NONE, 0, NONE, 0, 1, 0)),
    "vmsplice": ("vmsplice", (NONE, 0, 0, 0)),
    "tee": ("tee", (NONE, NONE, 1, 0)),
    "inotify_init1": ("inotify_init1", (0,)),
    "io_setup": ("io_setup", (0, BAD)),
    "msgget": ("msgget", (0, 0)),
    "shmget": ("shmget", (0, 0, 0)),
    "semget": ("semget", (0, 0, 0)),
    "mq_open": ("mq_open", (BAD, 0, 0, 0)),
    "timer_create": ("timer_create", (0, BAD, BAD)),
    "statmount": ("statmount", (BAD, BAD, 0, 0)),
    "listmount": ("listmount", (BAD, BAD, 0, 0)),
}

PASSES: Mapping[str, Call] = {
    "getpid": ("getpid", ()),
    "socket AF_UNIX": ("socket", (AF_UNIX, STREAM, 0)),
    "personality, asked for": ("personality", (0xFFFFFFFF,)),
    "clone": ("clone", (SIGCHLD, 0, 0, 0, 0)),
}
"""What must go through: a probe that is closed to these is broken."""

MEANINGFUL: Mapping[str, tuple[int, ...]] = {
    "socket": (AF_UNIX, STREAM, 0),
    "socketpair": (AF_UNIX, STREAM, 0, BAD),
    "clone": (SIGCHLD, 0, 0, 0, 0),
    "personality": (0xFFFFFFFF,),
    "futex": (0, 1, 1, 0, 0, 0),  # FUTEX_WAKE: for an unknown operation the kernel says ENOSYS
    "mlock": (0, 0),  # for anything longer than the limit it says EPERM
    "mlock2": (0, 0, 0),
    "kill": (NONE, 0),  # signal 0: only asks
    "pidfd_send_signal": (NONE, 0, 0, 0),
}
"""Arguments of calls in the sweep that NONE everywhere would not reach; the others get NONE."""

LEFT_OUT: Mapping[str, str] = {
    "vfork": "its child would run on the stack of ctypes in the parent",
    "reboot": "ends the machine where the sandbox is a virtual one; among the named calls without its magic",
    "sync": "writes back all disks of the host where it goes through",
}
"""Calls that the sweep does not make."""

_LAST = 600
"""Numbers up to here are tried: past those of any kernel we know, for those of future ones."""


@cache
def numbers(machine: str) -> Mapping[str, int]:
    """The system calls of an architecture: their numbers, as in the kernel's own tables.

    Raises:
        LookupError: Of an architecture that we have no table for.
    """
    table = files("orchestrator.probes").joinpath(f"syscalls_{machine}.txt")
    if not table.is_file():
        raise LookupError(f"there is no table of system calls for {machine}")
    entries = (line.split() for line in table.read_text(encoding="ascii").splitlines())
    return {name: int(number) for number, name in entries}


def named(machine: str) -> dict[str, list[int]]:
    """Number and arguments of every named call that the architecture has."""
    known = numbers(machine)
    wanted = {**CLOSED, **PASSES}
    return {label: [known[name], *values] for label, (name, values) in wanted.items() if name in known}


def sweep(machine: str) -> list[tuple[int, Sequence[int]]]:
    """Every number of the architecture, and those after them, with arguments that do nothing."""
    names = {number: name for name, number in numbers(machine).items()}
    return [
        (number, MEANINGFUL.get(names.get(number, ""), (NONE,) * 6))
        for number in range(_LAST)
        if names.get(number) not in LEFT_OUT
    ]


@cache
def allowed() -> frozenset[str]:
    """The calls that our seccomp profile lets through, whatever their arguments have to be."""
    profile = json.loads(files("orchestrator.sandbox").joinpath("seccomp.json").read_text(encoding="ascii"))
    return frozenset(
        name for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]
    )
