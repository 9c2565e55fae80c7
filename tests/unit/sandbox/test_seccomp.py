import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PROFILE: dict[str, Any] = json.loads(files("orchestrator.sandbox").joinpath("seccomp.json").read_text())
UNCONDITIONAL = {
    name
    for rule in PROFILE["syscalls"]
    if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule
    for name in rule["names"]
}

NEVER = {
    "acct", "add_key", "adjtimex", "bpf", "chroot", "clock_adjtime", "clock_settime", "clone3",
    "delete_module", "fanotify_init", "finit_module", "fsconfig", "fsmount", "fsopen", "fspick",
    "get_mempolicy", "init_module", "inotify_init", "inotify_init1", "io_setup", "io_uring_enter",
    "io_uring_register", "io_uring_setup", "ioperm", "iopl", "kcmp", "kexec_file_load", "kexec_load",
    "keyctl", "landlock_create_ruleset", "listmount", "lookup_dcookie", "mbind", "memfd_secret",
    "migrate_pages", "mknod", "mknodat", "modify_ldt", "mount", "mount_setattr", "move_mount", "move_pages",
    "mq_open", "msgget", "name_to_handle_at", "nfsservctl", "open_by_handle_at", "open_tree",
    "perf_event_open", "pidfd_getfd", "pivot_root", "process_madvise", "process_vm_readv",
    "process_vm_writev", "ptrace", "quotactl", "quotactl_fd", "reboot", "request_key", "sched_setattr",
    "seccomp", "semget", "setdomainname", "setfsgid", "setfsuid", "setgid", "setgroups", "sethostname",
    "setns", "setresgid", "setresuid", "settimeofday", "setuid", "shmget", "socketcall", "splice",
    "statmount", "swapoff", "swapon", "sync", "syslog", "tee", "timer_create", "umount", "umount2",
    "unshare", "uselib", "userfaultfd", "ustat", "vhangup", "vmsplice",
}  # fmt: skip


def rules_for(name: str) -> list[dict[str, Any]]:
    return [rule for rule in PROFILE["syscalls"] if name in rule["names"]]


def test_the_profile_is_what_its_source_says() -> None:
    check = [sys.executable, str(ROOT / "deploy" / "make-seccomp"), "--check"]
    subprocess.run(check, check=True, timeout=30)


def test_what_is_not_named_is_refused() -> None:
    assert PROFILE["defaultAction"] == "SCMP_ACT_ERRNO"


def test_no_call_is_allowed_that_no_cell_needs() -> None:
    assert UNCONDITIONAL.isdisjoint(NEVER)
    assert len(UNCONDITIONAL) > 200, "something is allowed"


def test_what_depends_on_arguments_is_nowhere_allowed_without_them() -> None:
    assert UNCONDITIONAL.isdisjoint({"socket", "socketpair", "clone", "personality"})


def test_a_socket_can_only_be_a_unix_socket() -> None:
    af_unix = {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}
    for name in ("socket", "socketpair"):
        (rule,) = rules_for(name)
        assert rule["args"] == [af_unix]


def test_no_flag_that_makes_a_namespace_passes_clone() -> None:
    (rule,) = rules_for("clone")
    new_ns, new_cgroup, new_uts, new_ipc = 0x00020000, 0x02000000, 0x04000000, 0x08000000
    new_user, new_pid, new_net = 0x10000000, 0x20000000, 0x40000000
    mask = new_ns | new_cgroup | new_uts | new_ipc | new_user | new_pid | new_net
    assert rule["args"] == [{"index": 0, "value": mask, "op": "SCMP_CMP_MASKED_EQ", "valueTwo": 0}]
    (clone3,) = rules_for("clone3")
    assert (clone3["action"], clone3["errnoRet"]) == ("SCMP_ACT_ERRNO", 38)


def test_a_personality_is_asked_for_or_plain() -> None:
    assert [rule["args"] for rule in rules_for("personality")] == [
        [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}] for value in (0, 0xFFFFFFFF)
    ]


def test_only_64_bit_tables_can_be_used() -> None:
    assert PROFILE["archMap"] == [
        {"architecture": architecture, "subArchitectures": []}
        for architecture in ("SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64")
    ]
