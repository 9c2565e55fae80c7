"""Every way a cell or its sandbox can end by resources, told apart from the host, in real containers.

The two runtimes differ where memory runs out: runc's kernel kills one process of the sandbox, gVisor is
itself one process, so all of it ends. Both are told as what they are.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest
from docker import DockerClient

from orchestrator.cells import CellLimit, CellOutcome, CellResult, Resource, SandboxLoss, UsedUp
from orchestrator.config import SandboxSettings, Settings
from orchestrator.prompts import cell_report
from orchestrator.trajectory import CellEnded, SandboxLeased
from tests.security.house import House, Inmate, Story, open_house

_MIB = 1024 * 1024
_SIZES = SandboxSettings(memory_mib=256, tmp_mib=32, shm_mib=16, pids=64, open_files=64)
_SIZES_OF_GVISOR = dataclasses.replace(_SIZES, pids=256)
"""It is itself some sixty threads, which count."""

HOARD = (
    f"hoard = bytearray({2 * _SIZES.memory_mib} << 20)\nfor at in range(0, len(hoard), 4096): hoard[at] = 1"
)
"""Twice the memory there is, every page touched."""
CHILD_HOARDS = f"import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', {HOARD!r}]).returncode)"
STUBBORN = "import time\nwhile True:\n  try:\n    time.sleep(60)\n  except BaseException: pass"


@pytest.fixture
async def house(settings: Settings, engine: DockerClient, runtime: str) -> AsyncIterator[House]:
    sizes = _SIZES if runtime == "runc" else _SIZES_OF_GVISOR
    async with open_house(dataclasses.replace(settings, sandbox=sizes), engine, runtime) as opened:
        yield opened


def told(result: CellResult) -> str:
    return cell_report(result)


async def still_works(inmate: Inmate) -> bool:
    return await inmate.says("print(6 * 7)") == "42"


# --- The interpreter --------------------------------------------------------------------------------------


@pytest.mark.case("E08")
async def test_a_cell_past_its_time_is_told_which_limit_it_passed(house: House) -> None:
    async with house.sandbox() as inmate:
        await inmate.cell("kept = 1")
        late = await inmate.cell("while True: pass", timeout_s=0.5)
        assert (late.outcome, late.passed) == (CellOutcome.INTERRUPTED, CellLimit.GUEST_TIME)
        assert "passed its time limit and was interrupted. The namespace is kept" in told(late)
        assert await inmate.says("print(kept)") == "1"


@pytest.mark.case("E09")
async def test_a_cell_that_does_not_stop_loses_its_interpreter_and_is_told_so(house: House) -> None:
    async with house.sandbox() as inmate:
        killed = await inmate.cell(STUBBORN, timeout_s=0.5)
        assert (killed.outcome, killed.passed) == (CellOutcome.KILLED, CellLimit.GUEST_TIME)
        assert "ignored the interrupt, so its interpreter was killed. The namespace is LOST" in told(killed)
        assert await still_works(inmate)


@pytest.mark.case("E03")
async def test_an_interpreter_out_of_memory_is_told_from_one_that_was_only_killed(
    house: House, runtime: str
) -> None:
    async with house.sandbox() as inmate:
        shot = await inmate.cell("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        assert (shot.outcome, shot.status, shot.used_up) == (CellOutcome.SIGNALLED, 9, ())
        assert await still_works(inmate)
        hoarded = await inmate.cell(HOARD)
        if runtime == "runc":
            assert hoarded.outcome is CellOutcome.OUT_OF_MEMORY
            assert "ran out of memory and was killed" in told(hoarded)
            assert await still_works(inmate)
        else:
            assert (hoarded.outcome, hoarded.loss) == (CellOutcome.SANDBOX_LOST, SandboxLoss.OUT_OF_MEMORY)
            assert "it ran out of memory as a whole" in told(hoarded)


@pytest.mark.case("E04")
async def test_a_child_out_of_memory_costs_its_cell_nothing_where_the_kernel_sees_it(
    house: House, runtime: str
) -> None:
    async with house.sandbox() as inmate:
        await inmate.cell("kept = 1")
        hoarded = await inmate.cell(CHILD_HOARDS)
        if runtime == "runc":
            assert (hoarded.outcome, hoarded.output) == (CellOutcome.OK, "-9\n")
            assert hoarded.used_up == (UsedUp(Resource.MEMORY, 256 * _MIB),)
            assert "the sandbox's memory was used up: 256 MiB" in told(hoarded)
            assert await inmate.says("print(kept)") == "1"
            # And later cells are not blamed for it.
            assert (await inmate.cell("1")).used_up == ()
            shot = await inmate.cell("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
            assert (shot.outcome, shot.used_up) == (CellOutcome.SIGNALLED, ())
        else:
            assert (hoarded.outcome, hoarded.loss) == (CellOutcome.SANDBOX_LOST, SandboxLoss.OUT_OF_MEMORY)


# --- What there is only so much of ------------------------------------------------------------------------


@pytest.mark.case("E05", "B09")
@pytest.mark.parametrize(
    ("path", "used"),
    [
        ("/tmp/full", UsedUp(Resource.TMP_BYTES, 32 * _MIB)),
        ("/dev/shm/full", UsedUp(Resource.SHM_BYTES, 16 * _MIB)),
    ],
)
async def test_a_full_file_system_is_a_cell_error_that_names_it_and_its_size(
    house: House, path: str, used: UsedUp
) -> None:
    async with house.sandbox() as inmate:
        await inmate.cell("kept = 1")
        full = await inmate.cell(
            f"with open({path!r}, 'wb') as file:\n  while True: file.write(bytes(65536))"
        )
        assert (full.outcome, full.used_up) == (CellOutcome.ERROR, (used,))
        assert f"{path.rpartition('/')[0]} is full: {used.limit // _MIB} MiB." in told(full)
        assert "No space left on device" in full.traceback
        assert await inmate.says("print(kept)") == "1"


@pytest.mark.case("B10")
@pytest.mark.parametrize("runtime", ["runc"])  # gVisor's tmpfs counts bytes only
async def test_too_many_files_are_a_cell_error_that_names_the_limit(house: House) -> None:
    async with house.sandbox() as inmate:
        many = await inmate.cell("for number in range(20_000): open(f'/tmp/{number}', 'w').close()")
        assert many.used_up == (UsedUp(Resource.TMP_FILES, 16_384),)
        assert "/tmp holds no more files: 16,384 at most." in told(many)


@pytest.mark.case("E12")
async def test_too_many_open_files_are_a_cell_error_that_names_the_limit(house: House) -> None:
    async with house.sandbox() as inmate:
        many = await inmate.cell("opened = [open('/dev/null') for number in range(200)]")
        assert (many.outcome, many.used_up) == (CellOutcome.ERROR, (UsedUp(Resource.OPEN_FILES, 64),))
        assert await still_works(inmate)


@pytest.mark.case("E01", "E02")
@pytest.mark.parametrize("runtime", ["runc"])  # gVisor's threads are its own, not the kernel's
@pytest.mark.parametrize(
    "code",
    [
        "import threading, time\nfor n in range(200): threading.Thread(target=time.sleep, args=(1,)).start()",
        "import subprocess\nrunning = [subprocess.Popen(['sleep', '1']) for number in range(200)]",
        "import os\nfor number in range(200):\n  try: pid = os.fork()\n  except OSError: break\n"
        "  if not pid: os.execv('/bin/sleep', ['sleep', '1'])",
    ],
    ids=["threads", "processes", "processes, and the cell swallows the error"],
)
async def test_too_many_processes_are_named_with_the_limit(house: House, code: str) -> None:
    async with house.sandbox() as inmate:
        many = await inmate.cell(code)
        assert many.used_up == (UsedUp(Resource.PROCESSES, 64),)
        assert "No more processes and threads could be started: 64 at most." in told(many)
        assert many.outcome.namespace_kept


# --- The whole sandbox ------------------------------------------------------------------------------------


@pytest.mark.case("E05")
async def test_a_sandbox_out_of_memory_as_a_whole_is_told_as_that(house: House, runtime: str) -> None:
    """Memory files are nobody's memory: the kernel kills what it can, and at last the worker."""
    hoard = (
        "import os\nfile = os.memfd_create('hoard')\nos.set_inheritable(file, True)\n"
        "if os.fork() == 0:\n"
        "  for number in range(600):\n"
        "    try: os.write(file, bytes(1 << 20))\n"
        "    except BaseException: pass\n"
        "import time; time.sleep(30)"
    )
    async with house.sandbox() as inmate:
        ended = await inmate.cell(hoard, timeout_s=20)
        if ended.outcome is CellOutcome.SANDBOX_LOST:
            assert ended.loss is SandboxLoss.OUT_OF_MEMORY
        else:
            # Where the kernel got enough back by killing what held the file.
            assert runtime == "runc"
            assert (ended.outcome is CellOutcome.OUT_OF_MEMORY) or Resource.MEMORY in {
                used.resource for used in ended.used_up
            }


SIGNALS = ["SIGKILL", "SIGTERM", "SIGINT", "SIGSEGV", "SIGHUP"]


@pytest.mark.case("C14", "E16")
async def test_signals_of_a_cell_end_its_own_sandbox_at_most(house: House, runtime: str) -> None:
    """On runc not even that: the kernel keeps them from the first process of a pid namespace."""
    async with house.sandbox() as neighbour:
        await neighbour.cell("kept = 1")
        for name in SIGNALS:
            async with house.sandbox() as inmate:
                shot = await inmate.cell(f"import os, signal, time; os.kill(1, signal.{name}); time.sleep(1)")
                if runtime == "runc":
                    assert shot.outcome is CellOutcome.OK, name
                    assert await still_works(inmate)
                else:
                    assert (shot.outcome, shot.loss) == (
                        CellOutcome.SANDBOX_LOST,
                        SandboxLoss.WORKER_ENDED,
                    ), name
        assert await neighbour.says("print(kept)") == "1"


@pytest.mark.case("C14")
async def test_a_cell_sees_and_signals_no_process_but_its_own(house: House) -> None:
    async with house.sandbox() as inmate, house.sandbox() as neighbour:
        seen = await inmate.says(
            "import os\nprint({int(pid) for pid in os.listdir('/proc') if pid.isdecimal()} - {os.getpid()})"
        )
        assert seen == "{1}"
        shot = await inmate.cell("import os, signal; os.kill(-1, signal.SIGKILL)")
        # With nobody else to signal the kernel says so; gVisor counts the worker.
        assert shot.outcome in {CellOutcome.ERROR, CellOutcome.SANDBOX_LOST}
        assert await still_works(neighbour)


@pytest.mark.case("C14")
async def test_a_container_killed_from_outside_is_told_as_that(house: House, runtime: str) -> None:
    async with house.sandbox() as inmate:
        await inmate.cell("x = 1")
        running = asyncio.create_task(inmate.cell("import time; time.sleep(60)"))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(house.engine.api.kill, inmate.container["Id"])
        lost = await running
        expected = SandboxLoss.CONTAINER_GONE if runtime == "runc" else SandboxLoss.WORKER_ENDED
        assert (lost.outcome, lost.loss) == (CellOutcome.SANDBOX_LOST, expected)
        assert lost.lost_variables == ("x",)


async def test_a_container_removed_from_outside_is_told_as_that(house: House) -> None:
    async with house.sandbox() as inmate:
        running = asyncio.create_task(inmate.cell("import time; time.sleep(60)"))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(house.engine.api.remove_container, inmate.container["Id"], force=True)
        assert (await running).loss is SandboxLoss.CONTAINER_GONE


@pytest.mark.parametrize("runtime", ["runc"])
async def test_a_killed_container_is_not_taken_for_out_of_memory_because_a_child_once_was(
    house: House,
) -> None:
    """The engine's flag says so; the kernel's counter, read beside it, says no.

    On a busy machine the kernel may forget it first, and then the flag stands: not three times, though.
    """
    losses = []
    for _ in range(3):
        async with house.sandbox() as inmate:
            assert (await inmate.cell(CHILD_HOARDS)).outcome is CellOutcome.OK
            running = asyncio.create_task(inmate.cell("import time; time.sleep(60)"))
            await asyncio.sleep(0.5)
            await asyncio.to_thread(house.engine.api.kill, inmate.container["Id"])
            losses.append((await running).loss)
            seen = await asyncio.to_thread(house.engine.api.inspect_container, inmate.container["Id"])
            assert seen["State"]["OOMKilled"], "else this shows nothing"
        if losses[-1] is SandboxLoss.CONTAINER_GONE:
            break
    assert losses[-1] is SandboxLoss.CONTAINER_GONE, losses


async def test_a_frozen_sandbox_is_given_up_as_silent(house: House) -> None:
    async with house.sandbox() as inmate:
        running = asyncio.create_task(inmate.cell("import time; time.sleep(60)", timeout_s=1.0))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(house.engine.api.pause, inmate.container["Id"])
        try:
            assert (await running).loss is SandboxLoss.WORKER_SILENT
        finally:
            await asyncio.to_thread(house.engine.api.unpause, inmate.container["Id"])


# --- A run whose sandbox is lost --------------------------------------------------------------------------


async def test_a_lost_sandbox_is_replaced_once_and_the_model_told_why(house: House, runtime: str) -> None:
    killed: list[str] = []

    async def kill_the_first(_request: object) -> None:
        leased = [event.payload for event in story.events if isinstance(event.payload, SandboxLeased)]
        if len(story.requests) == 2:
            killed.append(leased[-1].sandbox_id)
            await asyncio.to_thread(house.engine.api.kill, f"rlm-{leased[-1].sandbox_id}")

    story = Story()
    gone = "container_gone" if runtime == "runc" else "worker_ended"
    await house.cells(
        "found = [1, 2]",
        "print(found)",
        "FINAL(f\"{'found' in globals()} {len(context)}\")",
        before=kill_the_first,
        story=story,
    )
    ended = [event.payload for event in story.events if isinstance(event.payload, CellEnded)]
    assert [(cell.outcome, cell.loss) for cell in ended] == [
        ("ok", ""),
        ("sandbox_lost", gone),
        ("ok", ""),
    ]
    assert story.end.answer == f"False {len('nothing to see')}"
    assert "The sandbox was lost and has been replaced: " in story.told[-1]
    assert "The namespace is LOST" in story.told[-1]
    assert "these names are gone: found" in story.told[-1]
    assert len(killed) == 1
