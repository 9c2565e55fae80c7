"""Doors of the kernel that our seccomp profile closes; cases A03, A10, C01, C12 and D06.

The calls are those of the probes (`orchestrator/probes/calls.py`). A kernel answers EPERM too, so they are
also made in a sandbox that differs in one thing, the profile: what does not go through there proves nothing
here, and is in a list below.
"""

import asyncio
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from docker import DockerClient

from orchestrator.config import Settings
from orchestrator.models.port import ModelRequest
from orchestrator.probes.calls import CLOSED, PASSES
from orchestrator.probes.kernel import PROBES
from orchestrator.sandbox import posture
from tests.containers import containers_of
from tests.e2e.playing import Player
from tests.security.controls.weakened import UNCONFINED, weakened
from tests.security.probing import probe

NEEDS_A_CAPABILITY = {
    "acct", "delete_module", "finit_module", "fsmount", "fsopen", "fspick", "init_module", "ioperm", "iopl",
    "kexec_file_load", "kexec_load", "move_mount", "nfsservctl", "pivot_root", "reboot", "setdomainname",
    "sethostname", "swapoff", "swapon", "syslog", "vhangup", "socket AF_PACKET",
}  # fmt: skip
"""The kernel itself refuses these before it looks at an argument, or lacks them: no control can fire."""

SOME_HOSTS_REFUSE = {
    "bpf", "clone3", "io_setup", "io_uring_enter", "io_uring_register", "io_uring_setup", "listmount",
    "memfd_secret", "modify_ldt", "mount_setattr", "open_tree", "perf_event_open", "process_madvise",
    "statmount", "userfaultfd", "unshare NEWUSER", "clone NEWUSER", "clone NEWUSER NEWNET",
}  # fmt: skip
"""By their kernel's version or settings."""


def answers_in_a_sandbox(settings: Settings) -> Mapping[str, str]:
    """What each call came back with: `open`, or the name of an error or of the signal that ended it."""
    answers: dict[str, str] = probe(settings, "runc", [each for each in PROBES if each.source == "calls"]).of(
        "calls"
    )["calls"]
    assert {name: answers[name] for name in PASSES} == dict.fromkeys(PASSES, "open")
    return answers


@pytest.mark.case("A10", "C01", "C12", "D06")
def test_the_profile_closes_what_a_cell_does_not_need(settings: Settings) -> None:
    answers = answers_in_a_sandbox(settings)
    let_through = {name: answers[name] for name in CLOSED if answers[name] not in {"EPERM", "ENOSYS"}}
    assert let_through == {}
    assert answers["clone3"] == "ENOSYS", "so that the C library takes clone"
    if platform.machine() == "x86_64":
        assert (answers["i386 getpid"], answers["x32 getpid"]) == ("SIGSYS", "SIGSYS")


@pytest.mark.case("N10")
@pytest.mark.control("A10", "C01", "C12")
def test_without_the_profile_the_same_probes_go_through(
    settings: Settings, record_property: Callable[[str, object], None]
) -> None:
    with weakened(UNCONFINED):
        answers = answers_in_a_sandbox(settings)
    blind = {name for name in CLOSED if answers[name] in {"EPERM", "ENOSYS"}}
    record_property("blind probes", sorted(blind))
    assert blind <= NEEDS_A_CAPABILITY | SOME_HOSTS_REFUSE
    assert len(blind) < len(CLOSED) / 2
    assert "SIGSYS" not in answers.values()


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


@pytest.mark.case("A03")
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
