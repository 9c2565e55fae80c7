"""Doors of the kernel that our seccomp profile closes, tried from a cell; cases A03, A10, C01, C12 and D06.

A door is closed if the answer is EPERM or ENOSYS. Any other, EFAULT and EINVAL included, comes from the
kernel's own code: the call went through. A kernel answers EPERM too, so the same probes run in a sandbox that
differs in one thing, the profile: what does not go through there proves nothing here, and is in a list below.
"""

import asyncio
import errno
import json
import platform
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from docker import DockerClient

from orchestrator.models.port import ModelRequest
from orchestrator.sandbox import docker_driver, posture
from orchestrator.sandbox.port import SandboxSpec
from tests.e2e.conftest import containers_of
from tests.e2e.playing import Player

BAD = 1
"""An address nothing is at: who follows it says EFAULT."""

AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_ALG, AF_VSOCK = 2, 10, 16, 17, 38, 40
STREAM, DGRAM, RAW, SEQPACKET = 1, 2, 3, 5
NEW_USER, NEW_NET, FORK = 0x10000000, 0x40000000, signal.SIGCHLD.value
AT_FDCWD = -100

# x86_64. Arguments that do nothing where the call is let through.
CALLS: dict[str, tuple[int, ...]] = {
    "socket AF_INET": (41, AF_INET, STREAM, 0),
    "socket AF_INET datagrams": (41, AF_INET, DGRAM, 0),
    "socket AF_INET6": (41, AF_INET6, STREAM, 0),
    "socket AF_NETLINK": (41, AF_NETLINK, RAW, 0),
    "socket AF_PACKET": (41, AF_PACKET, RAW, 0),
    "socket AF_ALG": (41, AF_ALG, SEQPACKET, 0),
    "socket AF_VSOCK": (41, AF_VSOCK, STREAM, 0),
    "socketpair AF_INET": (53, AF_INET, STREAM, 0, BAD),
    "io_uring_setup": (425, 1, BAD),
    "io_uring_enter": (426, -1, 0, 0, 0, 0, 0),
    "io_uring_register": (427, -1, 0, 0, 0),
    "clone NEWUSER": (56, NEW_USER | FORK, 0, 0, 0, 0),
    "clone NEWUSER NEWNET": (56, NEW_USER | NEW_NET | FORK, 0, 0, 0, 0),
    "clone3": (435, BAD, 88),
    "unshare NEWUSER": (272, NEW_USER),
    "setns": (308, -1, 0),
    "ptrace TRACEME": (101, 0, 0, 0, 0),
    "process_vm_readv": (310, -1, 0, 0, 0, 0, 0),
    "process_vm_writev": (311, -1, 0, 0, 0, 0, 0),
    "process_madvise": (440, -1, 0, 0, 0, 0),
    "kcmp": (312, 1, 1, -1, 0, 0),
    "pidfd_getfd": (438, -1, 0, 0),
    "add_key": (248, BAD, BAD, 0, 0, 0),
    "request_key": (249, BAD, BAD, 0, 0),
    "keyctl": (250, 0, -1, 0, 0, 0),
    "bpf": (321, 0, BAD, 1 << 30),
    "perf_event_open": (298, BAD, 0, -1, -1, 0),
    "userfaultfd": (323, 1),
    "memfd_secret": (447, -1),
    "mount": (165, BAD, BAD, BAD, 0, 0),
    "umount2": (166, BAD, -1),
    "pivot_root": (155, BAD, BAD),
    "chroot": (161, BAD),
    "open_tree": (428, -1, BAD, 0),
    "move_mount": (429, -1, BAD, -1, BAD, 0),
    "fsopen": (430, BAD, 0),
    "fsconfig": (431, -1, 0, 0, 0, 0),
    "fsmount": (432, -1, 0, 0),
    "fspick": (433, -1, BAD, 0),
    "mount_setattr": (442, -1, BAD, 0, BAD, 1),
    "name_to_handle_at": (303, AT_FDCWD, BAD, BAD, BAD, 0),
    "open_by_handle_at": (304, -1, BAD, 0),
    "mknod": (133, BAD, 0o020600, 0x0103),
    "mknodat": (259, AT_FDCWD, BAD, 0o060600, 0x0800),
    "mknod of a pipe": (133, BAD, 0o010600, 0),
    "quotactl": (179, -1, BAD, 0, 0),
    "swapon": (167, BAD, 0),
    "swapoff": (168, BAD),
    "reboot": (169, 0, 0, 0, 0),
    "kexec_load": (246, 0, -1, BAD, 0),
    "kexec_file_load": (320, -1, -1, 0, 0, 0),
    "init_module": (175, BAD, 0, BAD),
    "finit_module": (313, -1, BAD, 0),
    "delete_module": (176, BAD, 0),
    "syslog": (103, 10, 0, 0),
    "settimeofday": (164, BAD, 0),
    "clock_settime": (227, 0, BAD),
    "adjtimex": (159, BAD),
    "clock_adjtime": (305, 0, BAD),
    "acct": (163, BAD),
    "sethostname": (170, BAD, 1),
    "personality": (135, 0x0040000),
    "personality with upper bits": (135, 0x0040000 | 1 << 32),
    "sched_setattr": (314, 0, 0, 0),
    "nfsservctl": (180, 0, 0, 0),
    "vhangup": (153,),
    "iopl": (172, 4),
    "ioperm": (173, 0, 0, 0),
    "modify_ldt": (154, 0, 0, 0),
    "seccomp": (317, 2, 0, 0),
    "splice": (275, -1, 0, -1, 0, 1, 0),
    "vmsplice": (278, -1, 0, 0, 0),
    "tee": (276, -1, -1, 1, 0),
    "inotify_init1": (294, 0),
    "io_setup": (206, 0, BAD),
    "msgget": (68, 0, 0),
    "shmget": (29, 0, 0, 0),
    "semget": (64, 0, 0, 0),
    "mq_open": (240, BAD, 0, 0, 0),
    "timer_create": (222, 0, BAD, BAD),
}

NEEDS_A_CAPABILITY = {
    "acct", "delete_module", "finit_module", "fsmount", "fsopen", "fspick", "init_module", "ioperm", "iopl",
    "kexec_file_load", "kexec_load", "move_mount", "nfsservctl", "pivot_root", "reboot", "sethostname",
    "swapoff", "swapon", "syslog", "vhangup", "socket AF_PACKET",
}  # fmt: skip
"""The kernel itself refuses these before it looks at an argument, or lacks them: no control can fire."""

SOME_HOSTS_REFUSE = {
    "bpf", "clone3", "io_setup", "io_uring_enter", "io_uring_register", "io_uring_setup", "memfd_secret",
    "modify_ldt", "mount_setattr", "open_tree", "perf_event_open", "process_madvise", "userfaultfd",
    "unshare NEWUSER", "clone NEWUSER", "clone NEWUSER NEWNET",
}  # fmt: skip
"""By their kernel's version or settings."""

OPEN = {
    "getpid": (39,),
    "socket AF_UNIX": (41, 1, STREAM, 0),
    "personality, asked for": (135, 0xFFFFFFFF),
    "clone": (56, FORK, 0, 0, 0, 0),
}
"""What must go through: a probe that is closed to these is broken."""

# In a process of its own, and every probe in another: what goes through can change the process that made it.
PROBES = """
import ctypes, json, mmap, os, subprocess, sys

def i386_getpid():
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("b814000000 cd80 c3"))  # mov eax, 20; int 0x80; ret
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

def call(numbers):
    ctypes.set_errno(0)
    result = libc.syscall(*[ctypes.c_long(number) for number in numbers])
    return ctypes.get_errno() if result == -1 else 0

def apart(what):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"%d." % what())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 100)
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else int(said.partition(b".")[0])

calls = json.loads(sys.argv[1])
answers = {name: apart(lambda: call(numbers)) for name, numbers in calls.items()}
answers["i386"] = apart(lambda: 0 if i386_getpid() > 0 else 1)
print(json.dumps(answers))
"""


async def answers_in_a_sandbox(player: Player) -> Mapping[str, int]:
    """What each probe came back with: 0, an errno, or minus the signal that ended it."""
    assert platform.machine() == "x86_64", "the numbers above are of x86_64"
    calls = json.dumps(CALLS | OPEN | {"x32": (0x40000000 | 39,)})
    cell = (
        "import subprocess, sys\n"
        f"command = [sys.executable, '-I', '-c', {PROBES!r}, {calls!r}]\n"
        "done = subprocess.run(command, capture_output=True, text=True)\n"
        "print(done.stdout or done.stderr)"
    )
    played = await player.cells(cell)
    (told,) = played.told
    answers: dict[str, int] = json.loads(told)
    assert answers.keys() == CALLS.keys() | OPEN.keys() | {"x32", "i386"}, "every probe ran"
    assert {name: answers[name] for name in OPEN} == dict.fromkeys(OPEN, 0)
    return answers


async def test_the_profile_closes_what_a_cell_does_not_need(player: Player) -> None:
    answers = await answers_in_a_sandbox(player)
    let_through = {
        name: errno.errorcode.get(answers[name], answers[name])
        for name in CALLS
        if answers[name] not in {errno.EPERM, errno.ENOSYS}
    }
    assert let_through == {}
    assert answers["clone3"] == errno.ENOSYS, "so that the C library takes clone"
    assert (answers["i386"], answers["x32"]) == (-signal.SIGSYS, -signal.SIGSYS)


async def test_without_the_profile_the_same_probes_go_through(
    player: Player, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    def weakened(spec: SandboxSpec, resources: posture.Resources, **named: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = posture.create_arguments(spec, resources, **named)
        options = arguments["HostConfig"]["SecurityOpt"]
        assert options[1].startswith("seccomp=")
        options[1] = "seccomp=unconfined"
        return arguments

    monkeypatch.setattr(docker_driver, "create_arguments", weakened)
    answers = await answers_in_a_sandbox(player)
    blind = {name for name in CALLS if answers[name] in {errno.EPERM, errno.ENOSYS}}
    record_property("blind probes", sorted(blind))
    assert blind <= NEEDS_A_CAPABILITY | SOME_HOSTS_REFUSE
    assert len(blind) < len(CALLS) / 2
    assert -signal.SIGSYS not in answers.values()


HONEST = """
import asyncio, ctypes, mmap, multiprocessing, os, shutil, socket, sqlite3, subprocess, sys
import tempfile, threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

with tempfile.TemporaryDirectory() as scratch:
    path = os.path.join(scratch, "numbers.db")
    with sqlite3.connect(path) as db:
        db.execute("pragma journal_mode = wal")
        db.execute("create table numbers as select 42 as number")
    shutil.copytree(scratch, scratch + "/copy")
    with sqlite3.connect(scratch + "/copy/numbers.db") as db:
        print("sqlite3", db.execute("select number from numbers").fetchone()[0])
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        print("mmap", mapped[:6])

print("subprocess", subprocess.check_output(["sh", "-c", "echo $((40 + 2))"], text=True).strip())
print("threads", sum(ThreadPoolExecutor(8).map(abs, range(-9, 0))))
for method in ("fork", "spawn", "forkserver"):
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        print(method, sum(pool.map(abs, range(-9, 0))))

async def main():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(42)", stdout=subprocess.PIPE)
    said = (await process.communicate())[0].decode().strip()
    server = await asyncio.start_unix_server(lambda reader, writer: writer.close(), "/tmp/server")
    await (await asyncio.open_unix_connection("/tmp/server"))[0].read()
    return said
result = []
thread = threading.Thread(target=lambda: result.append(asyncio.run(main())))
thread.start()
thread.join()
print("asyncio", *result)
print("ctypes", ctypes.CDLL(None).abs(-42))
left, right = socket.socketpair()
left.send(b"42")
print("socketpair", right.recv(9).decode())
"""


async def test_an_honest_cell_notices_nothing(player: Player) -> None:
    played = await player.cells(HONEST)
    assert played.told[0].splitlines() == [
        "sqlite3 42", "mmap b'SQLite'", "subprocess 42", "threads 45", "fork 45", "spawn 45", "forkserver 45",
        "asyncio 42", "ctypes 42", "socketpair 42",
    ]  # fmt: skip


async def test_the_engine_was_given_exactly_the_profile_of_this_package(
    player: Player, engine: DockerClient, state_dir: Path
) -> None:
    options: list[str] = []

    async def inspect(request: ModelRequest) -> None:
        for container in await asyncio.to_thread(containers_of, engine, state_dir):
            inspected = await asyncio.to_thread(engine.api.inspect_container, container)
            options.extend(inspected["HostConfig"]["SecurityOpt"])

    await player.run(player.script([]), before=inspect)
    profile = Path(posture.__file__).with_name("seccomp.json").read_text()
    assert options == ["no-new-privileges:true", f"seccomp={profile}"]
