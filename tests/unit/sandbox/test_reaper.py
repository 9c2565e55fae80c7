import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.errors import EngineError
from orchestrator.ids import InstanceId, SandboxId
from orchestrator.sandbox import reaper as reapers
from orchestrator.sandbox.instance import Instance, claim_instance, dead_instances
from orchestrator.sandbox.leftovers import end_leftovers, leftovers
from orchestrator.sandbox.port import Found
from orchestrator.sandbox.reaper import Reaper, Swept, is_left_behind, reaping
from orchestrator.sandbox.uids import GuestUids, claim_uids
from tests.fakes.process_driver import ProcessDriver

OWN, DEAD, LIVING, UNKNOWN = (InstanceId(name) for name in ("i-own", "i-dead", "i-living", "i-unknown"))
NOW_S = 1_700_000_000.0
PAST, FUTURE, NEVER = int(NOW_S) - 1, int(NOW_S) + 1, 0
ORDINARY_UID = 1_000
CONTAINER = "ab" * 32


class Engine(ProcessDriver):
    """Lists what it is told to, and may refuse to remove."""

    def __init__(self, *there: Found) -> None:
        super().__init__()
        self.there = {one.sandbox_id: one for one in there}
        self.stuck: set[SandboxId] = set()
        self.answers = True

    async def found(self) -> Sequence[Found]:
        if not self.answers:
            raise EngineError("it does not answer")
        return list(self.there.values())

    async def destroy(self, sandbox_id: SandboxId) -> None:
        if sandbox_id in self.stuck:
            raise EngineError("it is stuck")
        self.there.pop(sandbox_id, None)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Instance]:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with claim_instance(tmp_path / "state", uids_dir=tmp_path / "uids") as instance:
        yield instance


def dead_instance(tmp_path: Path, *sandboxes: SandboxId) -> InstanceId:
    """What a killed orchestrator with these sandboxes leaves."""
    program = (
        "import os, sys; from pathlib import Path\n"
        "from orchestrator.sandbox.instance import claim_instance\n"
        "with claim_instance(Path(sys.argv[1]), uids_dir=Path(sys.argv[2])) as instance:\n"
        "    for sandbox in sys.argv[3:]:\n"
        "        with instance.sandbox_directories(sandbox): pass\n"
        "        instance.begin(sandbox)\n"
        f"        instance.record(sandbox).write_text({CONTAINER!r})\n"
        "    print(instance.instance_id, flush=True); os._exit(9)\n"
    )
    arguments = [str(tmp_path / "state"), str(tmp_path / "uids"), *sandboxes]
    killed = subprocess.run(
        [sys.executable, "-c", program, *arguments], check=False, capture_output=True, text=True
    )
    return InstanceId(killed.stdout.strip())


# --- The rules --------------------------------------------------------------------------------------------


@pytest.mark.case("F01")
@pytest.mark.parametrize(
    ("instance", "sandbox", "expires_at_s", "gone"),
    [
        (OWN, "s-alive", PAST, False),
        (OWN, "s-other", FUTURE, True),
        (DEAD, "s-other", FUTURE, True),
        (DEAD, "s-other", NEVER, True),
        (LIVING, "s-other", PAST, False),
        (UNKNOWN, "s-other", PAST, True),
        (UNKNOWN, "s-other", FUTURE, False),
        (UNKNOWN, "s-other", NEVER, False),
        # The name of a sandbox says nothing about whose it is.
        (UNKNOWN, "s-alive", FUTURE, False),
        (DEAD, "s-alive", FUTURE, True),
    ],
)
def test_what_is_left_behind(instance: InstanceId, sandbox: str, expires_at_s: int, gone: bool) -> None:
    found = Found(SandboxId(sandbox), instance, expires_at_s, ORDINARY_UID)
    assert gone is is_left_behind(
        found,
        own=OWN,
        alive={SandboxId("s-alive")},
        dead={DEAD},
        living={LIVING, OWN},
        uids=None,
        now_s=NOW_S,
    )


@pytest.mark.case("F01")
def test_an_expired_sandbox_of_another_state_directory_goes_only_when_nobody_living_has_its_uid(
    tmp_path: Path,
) -> None:
    def left_behind(uid: int, uids: GuestUids | None) -> bool:
        found = Found(SandboxId("s1"), UNKNOWN, PAST, uid)
        return is_left_behind(found, own=OWN, alive=(), dead=(), living=(), uids=uids, now_s=NOW_S)

    with claim_uids(tmp_path) as ours:
        with claim_uids(tmp_path) as others:
            theirs = others.take(SandboxId("s1"))
            assert not left_behind(theirs, ours)
        assert left_behind(theirs, ours)
        # Without root nobody can tell, so it is left to root.
        assert not left_behind(theirs, None)


# --- Looking ----------------------------------------------------------------------------------------------


@pytest.mark.case("F01")
async def test_a_dead_instance_goes_with_everything_it_had(own: Instance, tmp_path: Path) -> None:
    sandboxes = [SandboxId(f"s{number}") for number in range(3)]
    dead = dead_instance(tmp_path, *sandboxes)
    engine = Engine(*(Found(name, dead, FUTURE, 0) for name in sandboxes))
    assert await Reaper(own, engine).sweep() == Swept(sandboxes=3, instances=1, uids=3)
    assert engine.there == {}
    assert dead_instances(tmp_path / "state") == []
    assert not list((tmp_path / "state/instances").glob(f"{dead}*"))
    assert not list((tmp_path / "uids").glob("*.uid"))
    assert await Reaper(own, engine).sweep() == Swept()


@pytest.mark.case("F06")
async def test_what_cannot_be_removed_is_tried_again_and_stays_known(own: Instance, tmp_path: Path) -> None:
    stuck, other = SandboxId("s0"), SandboxId("s1")
    dead = dead_instance(tmp_path, stuck, other)
    engine = Engine(Found(stuck, dead, FUTURE, 0), Found(other, dead, FUTURE, 0))
    engine.stuck = {stuck}
    reaper = Reaper(own, engine)
    assert await reaper.sweep() == Swept(sandboxes=1, uids=1, stuck=1)
    assert await reaper.sweep() == Swept(stuck=1)
    assert dead_instances(tmp_path / "state") == [dead]
    engine.stuck = set()
    assert await reaper.sweep() == Swept(sandboxes=1, instances=1, uids=1)


@pytest.mark.case("F06")
async def test_a_start_that_hangs_in_its_runtime_is_removed_with_the_runtimes_processes(
    own: Instance, tmp_path: Path
) -> None:
    hung = SandboxId("s0")
    dead = dead_instance(tmp_path, hung)

    class Hanging(Engine):
        async def destroy(self, sandbox_id: SandboxId) -> None:
            if runtime.poll() is None:
                raise EngineError("it does not answer")
            await super().destroy(sandbox_id)

    with runs_for(CONTAINER, tmp_path) as runtime:
        engine = Hanging(Found(hung, dead, FUTURE, 0))
        assert await Reaper(own, engine).sweep() == Swept(sandboxes=1, instances=1, uids=1, processes=1)
    assert engine.there == {}


@pytest.mark.case("F06", "F08")
async def test_our_own_leaked_sandbox_gets_its_place_and_uid_back_when_it_is_gone(own: Instance) -> None:
    leaks: list[int] = []
    own.on_leaks = leaks.append
    leaked, alive = SandboxId("s0"), SandboxId("s1")
    uid, _ = own.begin(leaked), own.begin(alive)
    own.leak(leaked, uid)
    engine = Engine(*(Found(name, own.instance_id, FUTURE, 0) for name in (leaked, alive)))
    engine.stuck = {leaked}
    reaper = Reaper(own, engine)
    assert await reaper.sweep() == Swept(stuck=1)
    assert uid not in {own.begin(SandboxId(f"t{number}")) for number in range(900)}
    engine.stuck = set()
    assert await reaper.sweep() == Swept(sandboxes=1)
    assert (leaks, own.leaked) == ([1, 0], {})
    assert set(engine.there) == {alive}


@pytest.mark.case("F06")
async def test_a_sandbox_whose_making_came_to_light_late_goes(own: Instance) -> None:
    engine = Engine(Found(SandboxId("s0"), own.instance_id, FUTURE, 0))
    assert await Reaper(own, engine).sweep() == Swept(sandboxes=1)


async def test_an_engine_that_does_not_answer_ends_neither_the_looking_nor_a_run(
    own: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reapers, "REAP_EVERY_S", 0.01)
    dead = dead_instance(tmp_path)
    engine = Engine()
    engine.answers = False
    async with reaping(Reaper(own, engine)):
        assert dead_instances(tmp_path / "state") == [dead]
        engine.answers = True
        for _ in range(500):
            if not dead_instances(tmp_path / "state"):
                break
            await asyncio.sleep(0.02)
        assert dead_instances(tmp_path / "state") == []


# --- Processes without a container ------------------------------------------------------------------------


@pytest.fixture
def shim(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like one of a runtime's to /proc."""
    program = tmp_path / "containerd-shim-test"
    shutil.copy(os.path.realpath("/bin/sleep"), program)
    process = subprocess.Popen([program, "60"])
    yield process
    process.kill()
    process.wait()


@contextmanager
def runs_for(container: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that could be a runtime's, of this container."""
    program = folder / "containerd-shim-other"
    shutil.copy(os.path.realpath("/bin/sh"), program)
    with subprocess.Popen([program, "-c", "read line", "-id", container], stdin=subprocess.PIPE) as process:
        yield process


def fake_process(proc: Path, pid: int, program: str, *arguments: str) -> None:
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "exe").symlink_to(program)
    (proc / str(pid) / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in arguments))


@pytest.mark.case("F01")
def test_only_a_runtimes_processes_of_that_very_container_are_leftovers(tmp_path: Path) -> None:
    other = "cd" * 32
    bundle = f"/run/containerd/io.containerd.runtime.v2.task/moby/{CONTAINER}"
    fake_process(tmp_path, 1, "/usr/bin/containerd-shim-runc-v2", "shim", "-id", CONTAINER)
    fake_process(tmp_path, 2, "/usr/bin/runsc", "runsc-gofer", f"--log={bundle}/log.json", "gofer")
    fake_process(tmp_path, 3, "/usr/bin/runsc", "runsc-sandbox", "boot", f"--bundle={bundle}", CONTAINER)
    fake_process(tmp_path, 4, "/usr/bin/containerd-shim-runc-v2", "shim", "-id", other)
    fake_process(tmp_path, 5, "/usr/bin/grep", "grep", CONTAINER)
    fake_process(tmp_path, 6, "/usr/bin/runsc", "runsc", CONTAINER + "ef")
    (tmp_path / "7").mkdir()
    (tmp_path / "self").mkdir()
    assert sorted(leftovers([CONTAINER], proc=tmp_path)) == [1, 2, 3]
    assert list(leftovers(["", "a", CONTAINER[:12]], proc=tmp_path)) == []


def test_a_living_process_that_names_another_container_is_let_live(shim: subprocess.Popen[bytes]) -> None:
    assert end_leftovers([CONTAINER]) == 0
    assert shim.poll() is None


@pytest.mark.case("F01")
def test_a_leftover_is_killed(shim: subprocess.Popen[bytes], tmp_path: Path) -> None:
    with runs_for(CONTAINER, tmp_path) as left:
        assert end_leftovers([CONTAINER]) == 1
        assert left.wait(10) == -9
        assert shim.poll() is None
